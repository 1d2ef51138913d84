"""Every paper trains, stops, resumes to the same bits, and evaluates."""

import pytest

from common import cli, papers


@pytest.mark.parametrize("slug", papers.slugs())
def test_smoke(slug, capsys):
    assert cli.main(["smoke", slug]) == 0, capsys.readouterr().err
