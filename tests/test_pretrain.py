"""The command that makes the shipped checkpoints, and what it leaves."""

import json
import types
from dataclasses import asdict, dataclass

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from common import cli, pretrain, results
from common.backbones import pretrained
from common.backbones.pretrained import Pretrained
from common.config import RunConfig
from common.errors import Interrupted
from common.pretrain import shipping


@dataclass
class OneConfig:
    width: int = 3


class One(Pretrained, nn.Module):
    config_class = OneConfig

    def __init__(self, config: OneConfig):
        super().__init__()
        self.config, self.layer = config, nn.Linear(config.width, 1)


def a_recipe() -> types.SimpleNamespace:
    def trained(cfg: RunConfig) -> dict[str, nn.Module]:
        model = One(OneConfig())
        nn.init.constant_(model.layer.weight, cfg.lr)
        return {"part": model}

    return types.SimpleNamespace(
        COMPONENTS={"part": One},
        train=trained,
        measure=lambda models: {"weight": models["part"].layer.weight.mean().item()},
        data=lambda cfg: {"numbers": "0123"},
        sheet=lambda models: Figure(),
    )


def test_a_checkpoint_and_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(shipping, "SHEETS", tmp_path / "sheets")
    monkeypatch.setattr(shipping, "recipe", lambda name: a_recipe())
    cfg = RunConfig(out=tmp_path / "run", seeds=(7,), lr=1 / 3)
    found = shipping.run("tiny-one", cfg, "just pretrain tiny-one")
    assert shipping.provenance("tiny-one") == json.loads(json.dumps(found))
    assert (found["seed"], found["command"], found["parameters"]) == (7, "just pretrain tiny-one", {"part": 4})
    assert found["quality"]["weight"] == torch.tensor(1 / 3).bfloat16().item()  # measured is what was written, not what was trained
    assert found["config"]["lr"] == 1 / 3
    assert "out" not in found["config"]
    assert (tmp_path / "sheets/tiny-one.png").is_file()
    assert shipping.load("tiny-one")["part"].layer.weight.dtype == torch.float32


def test_the_seconds_of_an_interrupted_run_count(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(shipping, "SHEETS", tmp_path / "sheets")
    module, clock = a_recipe(), [0.0]
    monkeypatch.setattr(shipping, "recipe", lambda name: module)
    monkeypatch.setattr(results.time, "monotonic", lambda: clock[0])
    whole = module.train

    def takes(seconds: float, interrupted: bool) -> None:
        def train(cfg: RunConfig) -> dict[str, nn.Module]:
            clock[0] += seconds
            if interrupted:
                raise Interrupted("stopped", 130)
            return whole(cfg)

        module.train = train

    cfg = RunConfig(out=tmp_path / "run")
    for seconds in (40.0, 5.0):
        takes(seconds, interrupted=True)
        with pytest.raises(Interrupted):
            shipping.run("tiny-one", cfg, "")
    takes(100.0, interrupted=False)
    assert shipping.run("tiny-one", cfg, "")["seconds"] == 145
    assert shipping.run("tiny-one", cfg, "")["seconds"] == 100  # nothing is left of the finished run


def test_names_and_help(capsys):
    assert {"tiny-lm", "tiny-reader", "tiny-sd"} <= set(pretrain.names())
    assert cli.main(["pretrain", "tiny-sdd"]) == 2
    assert "there is no recipe 'tiny-sdd': `just pretrain` takes one of tiny-" in capsys.readouterr().err
    assert cli.main(["pretrain"]) == 2
    assert "which checkpoint?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "tiny-lm", "--help"])
    assert stop.value.code == 0
    assert "--steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in pretrained.CHECKPOINTS.glob("*.json")))
def test_what_ships_is_whole_and_small(name):
    """The files, not their quality: that is measured beside each recipe's own tests."""
    found = shipping.provenance(name)
    assert {"command", "config", "seed", "data", "seconds", "quality"} <= set(found)
    folder = pretrained.CHECKPOINTS / name
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 4 * 2**20
    if found["command"] == f"just pretrain {name}":  # without options, the recipe as it stands
        recipe_now = json.loads(json.dumps(asdict(pretrain.recipe(name).SCALES["small"])))
        assert found["config"] == {key: recipe_now[key] for key in found["config"]}
    counted = {part or name: sum(p.numel() for p in model.parameters()) for part, model in shipping.load(name).items()}
    assert counted == found["parameters"]
