"""Every paper trains, stops, resumes to the same bits, and evaluates; and one that does not is found out."""

from types import SimpleNamespace

import pytest
import torch

from common import cli, loop, papers
from tests import toy


@pytest.mark.parametrize("slug", papers.slugs())
def test_smoke(slug, capsys):
    assert cli.main(["smoke", slug]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("repeatable", [True, False])
def test_a_run_that_cannot_be_repeated_fails(tmp_path, monkeypatch, capsys, repeatable):
    module = SimpleNamespace(SCALES={"smoke": toy.config(tmp_path)}, train=toy.train)
    monkeypatch.setattr(papers, "find", lambda slug: SimpleNamespace(module=lambda name: module))
    monkeypatch.setattr(cli, "_evaluate", lambda *args: None)
    if not repeatable:
        monkeypatch.setattr(loop.gpu, "seed_everything", lambda *seeds: torch.seed())
    assert cli.main(["smoke", "toy"]) == (0 if repeatable else 1)
    assert repeatable or "of the resumed run differs from the uninterrupted one's" in capsys.readouterr().err
