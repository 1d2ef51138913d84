"""Published checkpoint directories: every layout loads, every damage is refused with a sentence."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.backbones import pretrained
from common.backbones.pretrained import Pretrained
from common.errors import UserError


@dataclass
class SmallConfig:
    width: int
    tied: bool = True


class Small(Pretrained, nn.Module):
    """An embedding, a head that may be tied to it, and a table that no file holds."""

    config_class = SmallConfig

    def __init__(self, config: SmallConfig):
        super().__init__()
        self.config = config
        self.embed, self.head = nn.Embedding(5, config.width), nn.Linear(config.width, 5, bias=False)
        self.norm = nn.LayerNorm(config.width)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
        if config.tied:
            self.head.weight = self.embed.weight
        self.init_weights()

    @classmethod
    def rename(cls, name: str) -> str | None:
        return None if name.endswith("position_ids") else name.removeprefix("model.")


WEIGHTS = {
    "model.embed.weight": torch.randn(5, 3),
    "model.norm.weight": torch.randn(3),
    "model.norm.bias": torch.randn(3),
    "model.steps": torch.tensor([300]),
}
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def write(directory: Path, files: dict[str, dict]) -> Path:
    (directory / "config.json").write_text(json.dumps({"width": 3, "model_type": "small", "architectures": ["Small"]}))
    for file, tensors in files.items():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / file, metadata={"format": "pt"})
    return directory


@pytest.fixture
def sharded(tmp_path):
    """config.json, an index and two shards, as large models are published."""
    first, second = dict(list(WEIGHTS.items())[:1]), dict(list(WEIGHTS.items())[1:])
    names = dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND)
    index = {"metadata": {"total_size": 92}, "weight_map": names | {"model.position_ids": SECOND}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return write(tmp_path, {FIRST: first, SECOND: second | {"model.position_ids": torch.arange(3)}})


# ---- what loads -----------------------------------------------------------------------------------------------------------------------


def test_shards_load(sharded):
    model = Small.from_pretrained(sharded)
    assert all(torch.equal(model.state_dict()[Small.rename(name)], weight) for name, weight in WEIGHTS.items())
    assert model.head.weight is model.embed.weight and not model.training
    assert torch.equal(model.table, torch.arange(4.0)) and not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["model", "diffusion_pytorch_model", "anything"])
def test_one_file_loads_as_stored_or_as_asked(tmp_path, stored, name):
    write(tmp_path, {f"{name}.safetensors": {name: w.to(stored) if w.is_floating_point() else w for name, w in WEIGHTS.items()}})
    assert Small.from_pretrained(tmp_path).embed.weight.dtype == stored
    model = Small.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert model.norm.bias.dtype == torch.bfloat16 and model.steps.dtype == torch.long and model.steps == 300


def test_the_usual_name_wins(tmp_path):
    write(tmp_path, {"model.safetensors": WEIGHTS, "model.fp16.safetensors": {}, "consolidated.safetensors": {}})
    assert torch.equal(Small.from_pretrained(tmp_path).embed.weight, WEIGHTS["model.embed.weight"])


def test_training_leaves_the_file_alone(sharded):
    model = Small.from_pretrained(sharded)
    with torch.no_grad():
        model.embed.weight.add_(1)
    assert torch.equal(Small.from_pretrained(sharded).embed.weight, WEIGHTS["model.embed.weight"])


def test_the_shipped_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path)
    with pytest.raises(UserError, match="no small Small ships"):
        Small.from_pretrained("tiny")
    monkeypatch.setattr(Small, "tiny", "tiny-small")
    with pytest.raises(UserError, match="no small Small ships"):
        Small.from_pretrained("tiny")
    (tmp_path / "tiny-small").mkdir()
    write(tmp_path / "tiny-small", {"model.safetensors": {name: t.half() if t.is_floating_point() else t for name, t in WEIGHTS.items()}})
    loaded = Small.from_pretrained("tiny")
    assert torch.equal(loaded.embed.weight, WEIGHTS["model.embed.weight"].half().float())


@pytest.mark.parametrize("tied", [True, False])
def test_saved_weights_load(tmp_path, tied):
    model = Small(SmallConfig(width=4, tied=tied))
    model.steps += 7
    model.save_pretrained(tmp_path / "new", torch.bfloat16)
    loaded = Small.from_pretrained(tmp_path / "new")
    assert (loaded.head.weight is loaded.embed.weight) == tied
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor.bfloat16() if tensor.is_floating_point() else tensor), name


def test_hub_ids(sharded, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return sharded.parent if "/" in allow_patterns[0] else sharded

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in ("owner/name", f"owner/name/{sharded.name}"):
        assert torch.equal(Small.from_pretrained(name).embed.weight, WEIGHTS["model.embed.weight"])
    folder = f"{sharded.name}/"
    assert [name for name, _ in asked] == ["owner/name"] * 2 and asked[1][1] == [folder + pattern for pattern in asked[0][1]]
    assert "config.json" in asked[0][1] and not any("bin" in pattern for pattern in asked[0][1])


# ---- what is refused ------------------------------------------------------------------------------------------------------------------


def test_what_is_neither_here_nor_on_the_hub(monkeypatch):
    def offline(name, allow_patterns):
        raise OSError("no connection\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"nobody/nothing is no directory here and cannot be had from the hub \(no connection\): download it"):
        Small.from_pretrained("nobody/nothing")


def test_foreign_checkpoints_name_the_first_mismatches(sharded):
    (sharded / "config.json").write_text('{"width": 4}')
    with pytest.raises(UserError, match=r"model.embed.weight is \(5, 3\), not \(5, 4\); .* is \(3,\), not \(4,\); .* Is it a checkpoint of this"):
        Small.from_pretrained(sharded)
    (sharded / "config.json").write_text('{"width": 3, "tied": false}')
    with pytest.raises(UserError, match=r"does not fit Small: head.weight is missing\. Is it"):
        Small.from_pretrained(sharded)
    write(sharded, {FIRST: {f"layer.{i}": torch.ones(1) for i in range(4)}})
    with pytest.raises(UserError, match="embed.weight is missing; layer.0 is not in the model; layer.1 is not in the model and 2 more"):
        Small.from_pretrained(sharded)


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


DAMAGES = {
    "cut in the data": (lambda d: truncate(d / SECOND, -4), f"{SECOND} is not a whole safetensors file"),
    "cut in the header": (lambda d: truncate(d / SECOND, 30), f"{SECOND} is not a whole safetensors file"),
    "empty": (lambda d: truncate(d / FIRST, 0), f"{FIRST} is not a whole safetensors file"),
    "a pickle": (lambda d: (d / FIRST).write_bytes(pickle.dumps({"model.embed.weight": 1})), f"{FIRST} is not a whole safetensors file"),
    "shard missing": (lambda d: (d / SECOND).unlink(), f"lacks {SECOND}, which model.safetensors.index.json names: fetch the missing files"),
    "index missing": (lambda d: (d / "model.safetensors.index.json").unlink(), "found 2 of them and no index"),
    "index cut": (lambda d: truncate(d / "model.safetensors.index.json", 40), "index.json is not valid json"),
    "index of nothing": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "lacks the shards, which"),
    "config missing": (lambda d: (d / "config.json").unlink(), "has no config.json: give the directory of a published model"),
    "config cut": (lambda d: truncate(d / "config.json", 10), "config.json is not valid json"),
    "config of another model": (lambda d: (d / "config.json").write_text('{"d": 3}'), "the configuration lacks width, which SmallConfig needs"),
    "no weights": (
        lambda d: [file.unlink() for file in d.glob("model*")],
        "expected one .safetensors file, or several with an index json, found none",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_directories_are_refused(sharded, damage, message):
    damage(sharded)
    with pytest.raises(UserError, match=message):
        Small.from_pretrained(sharded)
