"""Published checkpoints: a directory with config.json and one or several safetensors, local or from the Hugging Face hub.

Names and shapes are checked before any weight is read, from the files' headers. Weights are mapped into memory and handed over shard by
shard, so that loading needs little more memory than the model. Nothing is unpickled.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from common.errors import UserError

CHECKPOINTS = Path(__file__).parents[2] / "data" / "checkpoints"  # the small ones that ship
STEMS = ("model", "diffusion_pytorch_model")  # of the weight files of transformers and of diffusers


class Pretrained:
    """Mixin of a backbone whose constructor takes one `config_class`, a dataclass with the fields of the published config.json."""

    config_class: type
    tiny: str = ""  # folder of the small one that ships, below data/checkpoints

    @classmethod
    def from_config(cls, config: dict) -> Self:
        """The model of a config.json, with fresh weights; keys it does not know are ignored. UserError for a missing one."""
        return cls(read_config(cls.config_class, config))

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Published parameter name -> ours; None for what the model does not keep."""
        return name

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype | None = None) -> Self:
        """source: a directory, a hub id such as "llava-hf/llava-1.5-7b-hf" with or without a folder behind it ("owner/name/unet"), or
        "tiny" for the small checkpoint that ships. dtype: default as stored, and float32 for "tiny". Raises UserError.
        """
        if source == "tiny":
            source, dtype = _tiny(cls), dtype or torch.float32
        config, files = _published(source)
        with _parameters_on_meta():
            model = cls.from_config(config)
        names = {file: _renamed(file, cls) for file in files}
        ties = _ties(model)
        _check(model, names, ties)
        shapes = {name: t.shape for name, t in model.state_dict().items()}
        for file, renamed in names.items():
            with safe_open(file, "pt") as shard:
                weights = {ours: _cast(shard.get_tensor(name), dtype).reshape(shapes[ours]) for name, ours in renamed.items()}
            model.load_state_dict(weights, strict=False, assign=True)
        for alias, name in ties.items():
            owner, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(name))
        return model.eval()

    def save_pretrained(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, which from_pretrained reads."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        ties = _ties(self)
        weights = {name: _cast(t, dtype).contiguous() for name, t in self.state_dict().items() if name not in ties}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    def init_weights(self) -> None:
        """For training from scratch: N(0, 0.02) matrices and tables, zero biases; norms stay 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)


def read_config(config_class: type, config: dict):
    """The dataclass from a json object that may have more keys."""
    known = fields(config_class)
    missing = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING and f.name not in config]
    if missing:
        raise UserError(f"the configuration lacks {', '.join(missing)}, which {config_class.__name__} needs: is it that of another model?")
    return config_class(**{f.name: config[f.name] for f in known if f.name in config})


def accept(config, **supported) -> None:
    """Refuse a configuration that asks for what the model does not implement; `supported` maps a field to its possible values."""
    for name, values in supported.items():
        if getattr(config, name) not in values:
            raise UserError(f"{name} = {getattr(config, name)!r} is not supported by {type(config).__name__}, only {', '.join(map(repr, values))}")


# ---- finding the files ----------------------------------------------------------------------------------------------------------------


def _tiny(cls: type[Pretrained]) -> Path:
    directory = CHECKPOINTS / cls.tiny
    if not cls.tiny or not directory.is_dir():
        raise UserError(f"no small {cls.__name__} ships in {CHECKPOINTS}: give the directory or hub id of a published one")
    return directory


def _published(source: str | Path) -> tuple[dict, list[Path]]:
    """Configuration and weight files of a directory or a hub id."""
    directory = Path(source) if Path(source).is_dir() else _download(str(source))
    return _json(directory / "config.json"), _shards(directory)


def _download(name: str) -> Path:
    """Fetch the configuration and the safetensors of a hub id, or find them in the cache."""
    from huggingface_hub import snapshot_download

    repository, folder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    files = ["config.json"] + [stem + tail for stem in STEMS for tail in (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")]
    try:
        return Path(snapshot_download(repository, allow_patterns=[f"{folder}/{file}".lstrip("/") for file in files])) / folder
    except Exception as error:  # one of a dozen, of the hub, of the connection, or of the name
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} is no directory here and cannot be had from the hub ({reason}): download it and give its directory") from None


def _shards(directory: Path) -> list[Path]:
    """The weight files: those an index names, or the one with the usual name, or the only one."""
    for stem in STEMS:
        index = directory / f"{stem}.safetensors.index.json"
        if index.is_file():
            files = [directory / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent or not files:
                raise UserError(f"{directory} lacks {', '.join(absent) or 'the shards'}, which {index.name} names: fetch the missing files")
            return files
    files = sorted(directory.glob("*.safetensors"))
    usual = [file for file in files if file.stem in STEMS]
    if len(files) != 1 and len(usual) != 1:
        found = f"{len(files)} of them and no index" if files else "none"
        raise UserError(f"{directory}: expected one .safetensors file, or several with an index json, found {found}")
    return usual or files


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}: give the directory of a published model") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid json ({error}): fetch it again") from None


# ---- filling the model ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside hold no weights; their buffers, which no checkpoint may have, are real."""
    register = nn.Module.register_parameter

    def without_storage(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_storage
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _renamed(file: Path, cls: type[Pretrained]) -> dict[str, str]:
    """Name in the file -> ours."""
    try:
        with safe_open(file, "pt") as shard:
            names = {name: cls.rename(name) for name in shard.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({str(error).splitlines()[0]}): fetch it again") from None
    return {name: ours for name, ours in names.items() if ours is not None}


def _ties(model: nn.Module) -> dict[str, str]:
    """Parameters that are one and the same, as {alias: first name}."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return ties


def _check(model: nn.Module, names: dict[Path, dict[str, str]], ties: dict[str, str]) -> None:
    """Refuse a checkpoint that misses a weight, has one too many or one of another shape."""
    ours, problems, seen = {name: tuple(t.shape) for name, t in model.state_dict().items()}, [], set()
    for file, renamed in names.items():
        with safe_open(file, "pt") as shard:
            for name, mine in renamed.items():
                shape = tuple(shard.get_slice(name).get_shape())
                seen.add(mine)
                if mine not in ours:
                    problems.append(f"{name} is not in the model")
                elif _without_trailing_ones(ours[mine]) != _without_trailing_ones(shape):
                    problems.append(f"{name} is {shape}, not {ours[mine]}")
    problems = [f"{name} is missing" for name in ours if name not in seen | ties.keys()] + problems
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{next(iter(names)).parent} does not fit {type(model).__name__}: {'; '.join(problems[:3])}{more}. Is it a checkpoint of this model?"
        )


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What counts of a shape: old files store some projections as 1x1 convolutions."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape
