"""Published checkpoint directories: every layout loads, every damage is refused with a sentence."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.backbones.pretrained import Pretrained
from common.errors import UserError


@dataclass
class TinyConfig:
    width: int
    tied: bool = True


class Tiny(Pretrained, nn.Module):
    """An embedding, a head that may be tied to it, and a table that no file holds."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, config.width), nn.Linear(config.width, 5, bias=False)
        self.norm = nn.LayerNorm(config.width)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        if config.tied:
            self.head.weight = self.embed.weight

    @classmethod
    def rename(cls, name: str) -> str | None:
        return None if name.endswith("position_ids") else name.removeprefix("model.")


WEIGHTS = {"model.embed.weight": torch.randn(5, 3), "model.norm.weight": torch.randn(3), "model.norm.bias": torch.randn(3)}


@pytest.fixture
def directory(tmp_path):
    """config.json, an index and two shards, as large models are published."""
    (tmp_path / "config.json").write_text(json.dumps({"width": 3, "model_type": "tiny", "architectures": ["Tiny"]}))
    shards = {
        "model-00001-of-00002.safetensors": ["model.embed.weight"],
        "model-00002-of-00002.safetensors": ["model.norm.weight", "model.norm.bias"],
    }
    for file, names in shards.items():
        extra = {"model.position_ids": torch.arange(3)} if len(names) == 2 else {}
        save_file({name: WEIGHTS[name].clone() for name in names} | extra, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_shards_load(directory):
    model = Tiny.from_pretrained(directory)
    for name, weight in WEIGHTS.items():
        assert torch.equal(model.state_dict()[Tiny.rename(name)], weight)
    assert model.head.weight is model.embed.weight and not model.training
    assert torch.equal(model.table, torch.arange(4.0)) and not any(t.is_meta for t in model.state_dict().values())


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_one_file_loads_as_stored_or_as_asked(tmp_path, stored):
    (tmp_path / "config.json").write_text('{"width": 3}')
    save_file({name: w.to(stored) for name, w in WEIGHTS.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert Tiny.from_pretrained(tmp_path).embed.weight.dtype == stored
    assert Tiny.from_pretrained(str(tmp_path), dtype=torch.bfloat16).norm.bias.dtype == torch.bfloat16


def test_an_untied_head_must_be_there(directory):
    (directory / "config.json").write_text('{"width": 3, "tied": false}')
    with pytest.raises(UserError, match=r"does not fit Tiny: head.weight is missing\. Is it a checkpoint of this model"):
        Tiny.from_pretrained(directory)


def test_foreign_checkpoints_name_the_first_mismatches(directory):
    (directory / "config.json").write_text('{"width": 4}')
    with pytest.raises(UserError, match=r"model.embed.weight is \(5, 3\), not \(5, 4\); .* is \(3,\), not \(4,\)"):
        Tiny.from_pretrained(directory)
    (directory / "config.json").write_text('{"width": 3}')
    save_file({"model.embed.weight": WEIGHTS["model.embed.weight"], "other": torch.ones(1)}, directory / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="other is not in the model"):
        Tiny.from_pretrained(directory)


def test_damaged_directories_are_refused(directory):
    shard = directory / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is not a whole safetensors file"):
        Tiny.from_pretrained(directory)
    shard.unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names"):
        Tiny.from_pretrained(directory)
    (directory / "model.safetensors.index.json").unlink()
    shard.write_bytes(whole)
    with pytest.raises(UserError, match="found 2 of them and no index"):
        Tiny.from_pretrained(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid json"):
        Tiny.from_pretrained(directory)
    (directory / "config.json").write_text("{}")
    with pytest.raises(UserError, match="the configuration lacks width"):
        Tiny.from_pretrained(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        Tiny.from_pretrained(directory)


def test_what_is_neither_here_nor_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: (_ for _ in ()).throw(OSError("no connection")))
    with pytest.raises(UserError, match=r"nobody/nothing is no directory here and cannot be had from the hub \(no connection\)"):
        Tiny.from_pretrained("nobody/nothing")
