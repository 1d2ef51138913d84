"""Rules, verdicts, tables and files of results."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from common import results
from common.config import RunConfig
from common.errors import UserError
from common.papers import Claim, Paper, Rule


@pytest.mark.parametrize(
    ("rule", "holds", "fails"),
    [("< 0", [-1, -1e-9], [0, 1]), (">= 1.5", [1.5, 2], [1.4]), ("== 0", [0, -0.0], [1e-12]), ("> -1.5 and < 1.5e0", [-1, 1], [-1.5, 1.5, 9])],
)
def test_rules(rule, holds, fails):
    assert all(Rule(rule).holds(x) for x in holds) and not any(Rule(rule).holds(x) for x in fails)


@pytest.mark.parametrize("text", ["", "0", "=< 1", "< x", "< 1 or > 2", "__import__('os')", "< 1 and", "< inf"])
def test_a_rule_outside_the_grammar_is_refused(text):
    with pytest.raises(UserError, match="is not of the form"):
        Rule(text)


def test_the_interval_is_student_s():
    values = [0.3, 1.1, 0.9, 0.2]
    low, high = results.interval(values)
    test = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((test.low, test.high))


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ([1.0, 1.1, 0.9], "reproduced"),
        ([3.0, -0.5, 1.0], "partly"),  # the mean is positive, the interval is not
        ([-1.0, -1.1, -0.9], "not at this scale"),
        ([1.0], "partly"),  # one seed has no interval
        (1.0, "reproduced"),  # a deterministic value needs none
        (-1.0, "not at this scale"),
    ],
)
def test_verdicts(measured, verdict):
    judged = results.judge(Rule("> 0"), measured)
    assert judged["verdict"] == verdict
    assert (judged["interval"] is None) == (not isinstance(measured, list) or len(measured) == 1)


def test_a_two_sided_rule_needs_the_whole_interval_inside():
    assert results.judge(Rule("> -1 and < 1"), [0.0, 0.1, -0.1])["verdict"] == "reproduced"
    assert results.judge(Rule("> -1 and < 1"), [0.9, -0.9, 0.1])["verdict"] == "partly"


@pytest.mark.parametrize("measured", [math.nan, [0.0, math.inf], []])
def test_what_is_no_number_is_not_judged(measured):
    with pytest.raises(ValueError, match="finite numbers"):
        results.judge(Rule("> 0"), measured)


@pytest.fixture
def paper():
    claims = (Claim("C1", "more | better", "2 against 1", "gain", Rule("> 0")), Claim("C2", "exact", "-", "error", Rule("== 0")))
    return Paper("toy", "Toy", "A", "V", 2020, "1", "f", "i", "", "", claims, {"C3": "needs a camera"})


def test_results_hold_all_that_a_verdict_rests_on(paper, tmp_path):
    measured = results.Measured({"C1": [1.0, 1.2], "C2": 0.0}, {"curve": [1]}, {"toy": "abc"})
    found = results.results(paper, RunConfig(seeds=(0, 1)), "small", measured, 1.23)
    results.save(found, tmp_path / "r.json")
    loaded = results.load(tmp_path / "r.json")
    assert loaded == json.loads(json.dumps(found))
    assert [c["verdict"] for c in loaded["claims"]] == ["partly", "reproduced"] and loaded["claims"][0]["values"] == [1.0, 1.2]
    assert loaded["config"]["seeds"] == [0, 1] and loaded["data"] == {"toy": "abc"} and loaded["versions"]["torch"] == torch.__version__.split("+")[0]
    table = results.claims_table(found)
    assert "more \\| better" in table and "| C3 | needs a camera |" in table and table.count("\n") == 4
    assert results.tally(found) == "1 reproduced, 1 partly, 1 not tested"
    assert "not tested" in results.console_table(found)


def test_claims_and_measurements_must_agree(paper):
    with pytest.raises(UserError, match=r"eval.py measures \['C1'\], paper.toml claims \['C1', 'C2'\]"):
        results.results(paper, RunConfig(), "small", results.Measured({"C1": 0.0}), 1)


def test_missing_and_broken_results_have_a_sentence(tmp_path):
    with pytest.raises(UserError, match="run `just repro` first"):
        results.load(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UserError, match="is not valid json"):
        results.load(tmp_path / "r.json")


def test_tables_are_replaced_between_their_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- report -->\nold\nold\n<!-- /report -->\nb\n")
    for text in ("new \\1", "newer"):
        results.between_markers(readme, text)
        assert readme.read_text() == f"a\n<!-- report -->\n{text}\n<!-- /report -->\nb\n"
    readme.write_text("a")
    with pytest.raises(UserError, match="has no lines <!-- report -->"):
        results.between_markers(readme, "x")


def test_figures_are_the_same_bytes_every_time(tmp_path):
    from matplotlib.figure import Figure

    for name in "ab":
        figure = Figure()
        figure.subplots().plot([1, 2], label="$x^2$")
        results.save_figure(figure, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_content_hash_sees_shape_type_and_value():
    a = np.arange(6)
    hashes = {results.content_hash(x) for x in (a, a.reshape(2, 3), a.astype(np.int32), a + 1, a.tobytes())}
    assert len(hashes) == 5 and results.content_hash(torch.arange(6)) == results.content_hash(a)


def test_seconds_add_up_over_interruptions(tmp_path, monkeypatch):
    clock = iter([10.0, 13.5, 100.0, 101.0])
    monkeypatch.setattr(results.time, "monotonic", lambda: next(clock))
    assert results.counted(tmp_path / "seconds") == 0
    with pytest.raises(KeyboardInterrupt), results.counting(tmp_path / "seconds"):
        raise KeyboardInterrupt
    with results.counting(tmp_path / "seconds"):
        pass
    assert results.counted(tmp_path / "seconds") == 4.5
