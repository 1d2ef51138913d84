"""From a recipe to the files under data/checkpoints, and back."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from common import results
from common.backbones import pretrained
from common.config import RunConfig
from common.pretrain import recipe

SHEETS = results.RESULTS / "backbones"


def load(name: str) -> dict[str, nn.Module]:
    """The shipped models of a recipe, by component."""
    folder = pretrained.CHECKPOINTS / name
    return {part: cls.from_pretrained(folder / part, dtype=torch.float32) for part, cls in recipe(name).COMPONENTS.items()}


def provenance(name: str) -> dict:
    """The json beside a shipped checkpoint."""
    return results.load(pretrained.CHECKPOINTS / f"{name}.json")


def run(name: str, cfg: RunConfig, command: str) -> dict:
    """Train, write the checkpoint and its json, and measure what was written. The sheet goes to results/backbones.

    An interrupted run is finished, and its seconds count; after a finished one, the next starts over.
    """
    module, spent = recipe(name), Path(cfg.out) / "seconds"
    with results.counting(spent):
        trained = module.train(cfg)
    for part, model in trained.items():
        model.save_pretrained(pretrained.CHECKPOINTS / name / part, torch.bfloat16)
    models = load(name)
    found = {
        "command": command,
        "config": {k: v for k, v in asdict(cfg).items() if k not in ("out", "weights", "data")},
        "seed": cfg.seeds[0],
        "data": module.data(cfg),
        "seconds": round(results.counted(spent), 1),
        "parameters": {part or name: sum(p.numel() for p in model.parameters()) for part, model in models.items()},
        "quality": module.measure(models),
        "commit": results.commit(),
        "versions": results.versions(),
        "hardware": results.hardware(),
    }
    results.save(found, pretrained.CHECKPOINTS / f"{name}.json")
    if hasattr(module, "sheet"):
        SHEETS.mkdir(parents=True, exist_ok=True)
        results.save_figure(module.sheet(models), SHEETS / f"{name}.png")
    results.start_over(Path(cfg.out))
    return found
