"""Every paper directory has the same form, and the command line answers mistakes with a sentence."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from common import cli, papers, results, scaffold
from common.errors import UserError

ROOT = Path(__file__).parent.parent
SLUGS = papers.slugs()


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "common.cli", *args], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})


# ---- the form of a paper --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", SLUGS)
def test_a_paper_has_five_files_with_docstrings(slug):
    check_form(papers.PAPERS / slug)


def check_form(directory: Path) -> None:
    assert {p.name for p in directory.iterdir()} - {"__pycache__"} == {"paper.toml", "model.py", "train.py", "eval.py", "README.md"}
    for path in directory.glob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("papers."):
                assert f"{node.module}.".startswith(f"papers.{directory.name}."), f"{path}:{node.lineno} imports another paper"
    for node in ast.parse((directory / "model.py").read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or directory.name.startswith("scaffolded"), f"{node.name} has no docstring"
    readme = (directory / "README.md").read_text()
    assert "<!-- report -->" in readme and "<!-- /report -->" in readme
    links = re.findall(r"\[model\.py:(\d+) `([^`]+)`\]\(model\.py#L(\d+)\)", readme)
    assert links, f"{directory.name}: the README maps no equation to a line"
    lines = (directory / "model.py").read_text().splitlines()
    for shown, name, target in links:
        assert shown == target and name in lines[int(target) - 1], f"README of {directory.name}: line {target} of model.py does not hold {name}"


@pytest.mark.parametrize("slug", SLUGS)
def test_paper_toml_reads(slug):
    paper = papers.find(slug)
    assert paper.claims and not {c.id for c in paper.claims} & set(paper.not_tested)
    assert all([paper.title, paper.authors, paper.venue, paper.arxiv, paper.family, paper.idea])
    assert all(c.text and c.paper and c.metric for c in paper.claims) and all(paper.not_tested.values())


@pytest.mark.parametrize("slug", SLUGS)
def test_the_light_config_is_the_real_one(slug):
    light, light_scales = papers.config(papers.PAPERS / slug / "train.py")
    module = papers.find(slug).module("train")
    assert [f.name for f in fields(light)] == [f.name for f in fields(module.Config)]
    assert {"smoke", "small", "full"} <= module.SCALES.keys() and {k: asdict(v) for k, v in light_scales.items()} == {
        k: asdict(v) for k, v in module.SCALES.items()
    }
    assert module.SCALES["smoke"].paper == slug


@pytest.mark.parametrize("slug", SLUGS)
def test_a_recorded_result_belongs_to_the_present_claims(slug):
    if slug not in results.recorded():
        pytest.skip("no result recorded yet")
    found, paper = results.recorded()[slug], papers.find(slug)
    assert [(c["id"], c["rule"]) for c in found["claims"]] == [(c.id, c.rule.text) for c in paper.claims]
    for claim in found["claims"]:  # a verdict is computed, never typed
        single = claim["interval"] is None and len(claim["values"]) == 1
        judged = results.judge(papers.Rule(claim["rule"]), claim["values"][0] if single else claim["values"])
        assert judged["verdict"] == claim["verdict"] and judged["mean"] == pytest.approx(claim["mean"])
        assert (judged["interval"] or []) == pytest.approx(claim["interval"] or [])


def test_the_reports_are_up_to_date(tmp_path, monkeypatch, capsys):
    """`just report` would change nothing."""
    copy = tmp_path / "atlas"
    (copy / "data").mkdir(parents=True)
    shutil.copytree(ROOT / "data/checkpoints", copy / "data/checkpoints")
    for name in ("README.md", "data/README.md", "papers", "results"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    for module, name, value in [
        (papers, "PAPERS", copy / "papers"), (results, "RESULTS", copy / "results"), (cli, "ROOT", copy)
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, value)
    assert cli.main(["report"]) == 0
    for path in ["README.md", "data/README.md", "results/RESULTS.md", *(f"papers/{slug}/README.md" for slug in SLUGS)]:
        assert (copy / path).read_text() == (ROOT / path).read_text(), f"{path} is stale: run `just report`"


# ---- a new paper ----------------------------------------------------------------------------------------------------------------------


def test_a_new_paper_has_the_form_and_runs(monkeypatch, tmp_path, capsys):
    slug = f"scaffolded_{os.getpid()}"
    try:
        assert cli.main(["new", slug]) == 0
        check_form(papers.PAPERS / slug)
        assert cli.main(["smoke", slug]) == 0, capsys.readouterr().err
        assert cli.main(["new", slug]) == 2 and "exists already" in capsys.readouterr().err
    finally:
        shutil.rmtree(papers.PAPERS / slug)


@pytest.mark.parametrize("slug", ["", "My-Paper", "../x", "3d"])
def test_a_bad_name_for_a_new_paper(slug):
    with pytest.raises(UserError, match="cannot be a paper's name"):
        scaffold.scaffold(slug)


# ---- the command line -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [["--help"], ["list"], ["repro", "--help"], ["smoke", "--help"], *(["repro", slug, "--help"] for slug in SLUGS)], ids=" ".join
)
def test_help_and_list_answer_without_torch(args):
    """torch alone takes seconds to import; the time itself is for a quiet machine to show."""
    script = "import sys; from common.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "False", done.stderr
    assert len(done.stdout) > 50 or args == ["list"]


def test_help_shows_the_paper_s_own_fields():
    slug = SLUGS[0]
    own = [f.name for f in fields(papers.config(papers.PAPERS / slug / "train.py")[0])][-1]
    assert f"--{own.replace('_', '-')}" in run("repro", slug, "--help").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["repro", "crosformer"], "there is no paper 'crosformer': did you mean 'crossformer'? `just list` names them all"),
        (["repro", "zzz"], "there is no paper 'zzz': `just list` names them all"),
        (["repro"], "which paper?"),
        (["dance"], "there is no command 'dance'"),
        (["repro", SLUGS[0], "--scale", "huge"], "has no scale 'huge': take one of"),
        (["repro", SLUGS[0], "--steps", "0"], "--steps 0: give at least 1"),
        (["train", SLUGS[0], "--scale", "smoke", "--device", "abacus"], "torch knows no such device"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_are_answered_with_one_sentence(args, message, capsys):
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("args", [["--stepps", "3"], ["--steps", "many"]], ids=" ".join)
def test_bad_flags_are_named(args):
    done = run("repro", SLUGS[0], *args)
    assert done.returncode == 2 and args[0] in done.stderr + done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "whole_group", "code"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)])
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, number, whole_group, code):
    """Two runs at a time: a terminal signals them all, `kill` only the parent."""
    options = ["--scale", "smoke", "--steps", "1000000", "--seeds", "0", "1", "--processes", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "common.cli", "train", SLUGS[0], *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)
    while len(logs := list(tmp_path.rglob("metrics.jsonl"))) < 2 or not all(log.read_text() for log in logs):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and f"resume with: just train {SLUGS[0]} --scale smoke" in stderr and "Traceback" not in stderr, stderr
    assert len(list(tmp_path.rglob("step-*.pt"))) == 2


def test_data_is_listed_with_hashes(capsys):
    assert cli.main(["data"]) == 0
    assert re.search(r"digits +[0-9a-f]{16}\n", capsys.readouterr().out)


def test_a_broken_paper_toml_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "PAPERS", tmp_path)
    (tmp_path / "broken").mkdir()
    for text, message in [("title = ", "is not valid TOML"), ('title = "x"', "lacks the key")]:
        (tmp_path / "broken/paper.toml").write_text(text)
        with pytest.raises(UserError, match=message):
            papers.find("broken")


def test_a_config_that_needs_torch_is_refused(tmp_path):
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy/train.py").write_text("import torch\nclass Config:\n    x: int = torch.get_num_threads()\nSCALES = {}\n")
    with pytest.raises(UserError, match="Config and SCALES must need no imports but"):
        papers.config(tmp_path / "heavy/train.py")
