"""Claims -> measurements -> verdicts -> results.json, tables and figures.

    reproduced              the whole 95% interval over seeds satisfies the claim's rule
    partly                  only the mean does
    not at this scale       neither

The interval is Student's over the per-seed values, which eval.py pairs (method and baseline of the same seed) before it hands them over.
A deterministic quantity, an identity or a count or a ratio timed in alternation, is a single number without an interval.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.config import RunConfig
from common.errors import UserError
from common.papers import ROOT, Paper, Rule

RESULTS = ROOT / "results"
VERDICTS = ("reproduced", "partly", "not at this scale")


@dataclass
class Measured:
    """What a paper's eval.py found."""

    values: dict[str, float | list[float]]  # claim id -> one value per seed, or one deterministic value
    details: dict = field(default_factory=dict)  # JSON: all that figure() draws and the README tells
    data: dict[str, str] = field(default_factory=dict)  # dataset -> content hash


# ---- verdicts -------------------------------------------------------------------------------------------------------------------------


def interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t-interval of the mean; infinite for a single value."""
    if len(values) < 2:
        return -math.inf, math.inf
    from scipy.stats import t  # a second of import that `just list` need not pay

    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def judge(rule: Rule, measured: float | list[float]) -> dict:
    """{"values", "mean", "interval", "verdict"} of one claim. Raises ValueError for a measurement that is no number."""
    values = measured if isinstance(measured, list) else [measured]
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"a measurement must be finite numbers, got {measured}")
    mean = statistics.fmean(values)
    low, high = interval(values) if isinstance(measured, list) else (mean, mean)
    # a rule is an interval of the real line, so it holds between two points where it holds at both
    whole = rule.holds(low) and rule.holds(high)
    verdict = VERDICTS[0] if whole else VERDICTS[1] if rule.holds(mean) else VERDICTS[2]
    shown = [low, high] if isinstance(measured, list) and len(values) > 1 else None
    return {"values": values, "mean": mean, "interval": shown, "verdict": verdict}


def results(paper: Paper, cfg: RunConfig, scale: str, measured: Measured, seconds: float) -> dict:
    """The whole result of one evaluation, ready for json. Raises UserError if eval.py measured other claims than paper.toml lists."""
    listed = {claim.id for claim in paper.claims}
    if listed != set(measured.values):
        raise UserError(f"papers/{paper.slug}: eval.py measures {sorted(measured.values)}, paper.toml claims {sorted(listed)}: make them agree")
    claims = [
        {"id": c.id, "text": c.text, "paper": c.paper, "metric": c.metric, "rule": c.rule.text} | judge(c.rule, measured.values[c.id])
        for c in paper.claims
    ]
    return {
        "paper": paper.slug,
        "title": paper.title,
        "scale": scale,
        "claims": claims,
        "not_tested": [{"id": i, "why": why} for i, why in paper.not_tested.items()],
        "config": json.loads(json.dumps(asdict(cfg) | {"out": None}, default=str)),
        "seconds": round(seconds, 1),
        "data": measured.data,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "details": measured.details,
    }


def content_hash(*arrays) -> str:
    """First 16 hex digits of the SHA-256 over shapes, types and bytes of tensors, arrays or bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        if not isinstance(array, bytes):
            array = array.numpy() if hasattr(array, "numpy") else array
            digest.update(f"{array.dtype}{array.shape}".encode())
            array = array.tobytes()
        digest.update(array)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    names = ("torch", "torchvision", "timm", "numpy", "scikit-image", "scikit-learn")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def hardware() -> dict:
    import torch

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    found = {"cpu": cpu.group(1) if cpu else platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno", "--", "common", "papers"], capture_output=True, text=True, check=True).stdout
        return head + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- files ----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def counting(path: Path) -> Iterator[None]:
    """Add the seconds that the block takes to the number in a file, those until an interruption too."""
    began = time.monotonic()
    try:
        yield
    finally:
        write(path, str(counted(path) + time.monotonic() - began))


def start_over(run: Path) -> None:
    """Forget the checkpoints below a finished run's directory, and its seconds; what else lies there stays."""
    for checkpoint in run.rglob("step-*"):
        checkpoint.unlink()
    (run / "seconds").unlink(missing_ok=True)


def counted(path: Path) -> float:
    """The number in that file; 0 if there is none."""
    return float(path.read_text()) if path.exists() else 0.0


def write(path: Path, text: str) -> None:
    """Replace a text file in one step; an error leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def save(found: dict, path: Path) -> None:
    write(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `just repro` first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid json ({error}): delete it and run `just repro` again") from None


def recorded() -> dict[str, dict]:
    """The committed reference results, by paper."""
    return {path.stem: load(path) for path in sorted(RESULTS.glob("*.json")) if path.stem != "bench"}


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as SVG, the same bytes for the same figure."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "attention-atlas"}):
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


# ---- tables ---------------------------------------------------------------------------------------------------------------------------


def number(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def shown(claim: dict) -> str:
    """Mean and interval of a judged claim."""
    if claim["interval"] is None:
        return number(claim["mean"])
    low, high = claim["interval"]
    return f"{number(claim['mean'])} [{number(low)}, {number(high)}]"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    return "\n".join([_row(head), _row("---" for _ in head), *map(_row, rows)])


def claims_table(found: dict) -> str:
    """Claim, paper, rule, measured, verdict: the table of a paper's README."""
    rows = [[c["id"], c["text"], c["paper"], f"{c['metric']} {c['rule']}", shown(c), f"**{c['verdict']}**"] for c in found["claims"]]
    rows += [[entry["id"], entry["why"], "", "", "", "not tested"] for entry in found["not_tested"]]
    return table(["", "claim", "paper", "we measure, and ask", "measured [95%]", "verdict"], rows)


def console_table(found: dict) -> str:
    """The verdicts, aligned for a terminal."""
    rows = [[c["id"], c["verdict"], shown(c), c["rule"], c["text"]] for c in found["claims"]]
    rows += [[entry["id"], "not tested", "", "", entry["why"]] for entry in found["not_tested"]]
    head = ["", "verdict", "measured [95%]", "asked", "claim"]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in [head, *rows])


def tally(found: dict) -> str:
    counts = Counter(c["verdict"] for c in found["claims"])
    parts = [f"{counts[v]} {v}" for v in VERDICTS if counts[v]]
    return ", ".join(parts + ([f"{len(found['not_tested'])} not tested"] if found["not_tested"] else []))


def between_markers(path: Path, text: str) -> None:
    """Replace what stands between `<!-- report -->` and `<!-- /report -->`. Raises UserError for a file without the markers."""
    old = path.read_text()
    new, found = re.subn(r"(<!-- report -->\n).*?(\n?<!-- /report -->)", lambda m: m.group(1) + text + "\n<!-- /report -->", old, count=1, flags=re.S)
    if not found:
        raise UserError(f"{path} has no lines <!-- report --> and <!-- /report -->: add them where the table belongs")
    if new != old:
        write(path, new)
