"""atlas: the command line behind every `just` recipe.

    list                       the papers, with their verdicts
    repro  PAPER [options]     train and evaluate, judge every claim, draw the figure
    train  PAPER [options]     train only (under torchrun on several GPUs)
    eval   PAPER [options]     evaluate what was trained, or with --weights FILE --data DIR a published checkpoint
    smoke  [PAPER ...]         train, interrupt, resume and evaluate at the smallest scale
    record PAPER ...           make the last repro the reference under results/
    report                     write the tables of the READMEs and results/RESULTS.md from results/
    bench  [NAME ...]          measure the efficiency figures of papers, common or backbones into results/bench.json
    data                       what data the default runs use, with hashes
    new    PAPER               start a paper directory
    pretrain NAME [options]    train a small checkpoint of data/checkpoints from scratch

Options are --scale (smoke, small, full) and the fields of the paper's Config: `atlas repro PAPER --help` lists them.
"""

import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common import papers, results
from common.errors import Interrupted, UserError
from common.papers import ROOT, Paper

RUNS = ROOT / "runs"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failed smoke test, 2 for bad input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    asked = not {"-h", "--help"}.isdisjoint(rest) and command not in ("repro", "train", "eval", "pretrain")
    if command in ("-h", "--help", "help") or asked:
        print(__doc__)
        return 0
    try:
        if command not in COMMANDS:
            raise UserError(f"there is no command {command!r}: `atlas --help` lists them")
        return COMMANDS[command](rest) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"{error or 'interrupted'}\nresume with: just {' '.join([command, *rest])}", file=sys.stderr)
        return getattr(error, "code", 130)


# ---- options --------------------------------------------------------------------------------------------------------------------------


def _options(command: str, argv: list[str]):
    """(paper, scale, Config) from `PAPER [--scale S] [--field value ...]`."""
    slug, rest = _subject(command, argv, "PAPER", "which paper? `just {} PAPER`; `just list` names them")
    paper = papers.find(slug)
    scale, cfg = _config(
        f"just {command} {slug}", f"{paper.title}: {paper.idea}", paper.directory / "train.py", rest, lambda: paper.module("train").SCALES,
        lambda scale: RUNS / paper.slug / scale,
    )  # fmt: skip
    return paper, scale, cfg


def _subject(command: str, argv: list[str], kind: str, question: str) -> tuple[str, list[str]]:
    """What the command is about, and the options after it."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: just {command} {kind} [--scale SCALE] [options]\n\nThe options are its own: just {command} {kind} --help")
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(question.format(command))
    return argv[0], argv[1:]


def _config(prog: str, about: str, file: Path, argv: list[str], scales_of: Callable[[], dict], out: Callable[[str], Path]):
    """(scale, Config) from `[--scale S] [--field value ...]`; `file` holds Config and SCALES."""
    import tyro

    scale, rest = "small", list(argv)
    if "--scale" in rest:
        at = rest.index("--scale")
        if at + 1 == len(rest):
            raise UserError("--scale needs a value: smoke, small or full")
        scale = rest[at + 1]
        del rest[at : at + 2]
    # the options are parsed twice: first without torch, so that --help and mistakes answer at once
    for load in (lambda: papers.config(file)[1], scales_of):
        scales = load()
        if scale not in scales:
            raise UserError(f"{prog} has no scale {scale!r}: take one of {', '.join(scales)}")
        default = replace(scales[scale], out=out(scale))
        description = f"{about}\n\nDefaults of --scale {scale}; others: {', '.join(s for s in scales if s != scale)}."
        cfg = tyro.cli(type(default), default=default, args=rest, prog=f"{prog} [--scale SCALE]", description=description)
    return scale, cfg


# ---- commands -------------------------------------------------------------------------------------------------------------------------


def list_papers(argv: list[str]) -> None:
    found = results.recorded()
    rows = [(slug, papers.find(slug)) for slug in papers.slugs()]
    width = max((len(slug) for slug, _ in rows), default=0)
    for slug, paper in rows:
        verdicts = results.tally(found[slug]) if slug in found else "no recorded result"
        print(f"{slug:<{width}}  {paper.year}  {paper.title}\n{'':<{width}}        {verdicts}")


def repro(argv: list[str]) -> None:
    paper, scale, cfg = _options("repro", argv)
    if (cfg.out / "results.json").exists():  # the last repro ended: this is a new one, not its continuation
        results.start_over(cfg.out)
        (cfg.out / "results.json").unlink()
    with results.counting(cfg.out / "seconds"):
        paper.module("train").train(cfg)
    _evaluate(paper, scale, cfg)


def train(argv: list[str]) -> None:
    paper, _, cfg = _options("train", argv)
    from common import gpu

    with gpu.process_group():
        paper.module("train").train(cfg)
        gpu.say(f"trained: {cfg.out}")


def evaluate(argv: list[str]) -> None:
    paper, scale, cfg = _options("eval", argv)
    if cfg.weights is None:
        return _evaluate(paper, scale, cfg)
    published = getattr(paper.module("eval"), "evaluate_published", None)
    if published is None:
        raise UserError(f"{paper.slug} has no published weights to evaluate")
    for name, value in published(cfg).items():
        print(f"{name}  {value}")


def _evaluate(paper: Paper, scale: str, cfg) -> None:
    """Measure, judge, draw, and leave results.json and figure.svg in the run directory. The time is that of the training and of this."""
    began = time.monotonic() - results.counted(cfg.out / "seconds")
    module = paper.module("eval")
    measured = module.evaluate(cfg)
    found = results.results(paper, cfg, scale, measured, time.monotonic() - began)
    results.save_figure(module.figure(found["details"]), cfg.out / "figure.svg")
    results.save(found, cfg.out / "results.json")
    print(f"\n{paper.title} (arXiv {paper.arxiv})\n\n{results.console_table(found)}\n\n{results.tally(found)}")
    print(f"{found['seconds']:.0f} s; details in {cfg.out / 'results.json'}, figure in {cfg.out / 'figure.svg'}")


def smoke(argv: list[str]) -> int:
    failed = 0
    for slug in argv or papers.slugs():
        began = time.monotonic()
        try:
            _smoke(papers.find(slug))
            print(f"smoke {slug}: ok, {time.monotonic() - began:.1f} s")
        except AssertionError as error:
            failed = 1
            print(f"smoke {slug}: FAILED, {error}", file=sys.stderr)
    return failed


def _smoke(paper: Paper) -> None:
    """Train in two pieces and in one, compare the weights bit for bit, evaluate. One thread, for the models are too small for two."""
    import torch

    from common import loop

    torch.set_num_threads(1)
    module = paper.module("train")
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(module.SCALES["smoke"], out=Path(folder) / "resumed")
        try:
            with loop.interrupt_at(cfg.steps // 2):
                module.train(cfg)
            raise AssertionError("training ran through an interruption: does every run go through fit()?")
        except Interrupted:
            module.train(cfg)
        whole = replace(cfg, out=Path(folder) / "whole")
        module.train(whole)
        for path in sorted(whole.out.rglob("*.safetensors")):
            run = path.relative_to(whole.out)
            (resumed, _), (once, _) = loop.read_safetensors(cfg.out / run), loop.read_safetensors(path)
            assert all(resumed[name].equal(once[name]) for name in resumed | once), f"{run} of the resumed run differs from the uninterrupted one's"
        _evaluate(paper, "smoke", cfg)


def record(argv: list[str]) -> None:
    for slug in argv or [None]:
        paper = papers.find(slug or "")
        source = RUNS / paper.slug / "small"
        found = results.load(source / "results.json")
        results.save(found, results.RESULTS / f"{paper.slug}.json")
        shutil.copyfile(source / "figure.svg", results.RESULTS / f"{paper.slug}.svg")
        print(f"recorded {paper.slug}: {results.tally(found)}")
    report([])


def report(argv: list[str]) -> None:
    found = results.recorded()
    overview, sections = [], []
    for slug in papers.slugs():
        paper = papers.find(slug)
        link = f"[{paper.title}](papers/{slug}/README.md)"
        verdicts = results.tally(found[slug]) if slug in found else "no recorded result"
        overview.append([f"`{slug}`", f"{link} ({paper.venue} {paper.year})", paper.idea, verdicts])
        if slug in found:
            took = f"{found[slug]['seconds'] / 60:.1f} minutes on {found[slug]['hardware']['cores']} cores"
            table = f"{results.claims_table(found[slug])}\n\n{results.tally(found[slug])}; `just repro {slug}` took {took}."
            results.between_markers(paper.directory / "README.md", table)
            sections.append(f"## [{paper.title}](../papers/{slug}/README.md)\n\n{table}\n")
    results.between_markers(ROOT / "README.md", results.table(["paper", "", "idea", "claims"], overview))
    head = "# Results\n\nWritten by `just report` from the jsons beside this file, which `just record` takes from `just repro`.\n"
    results.write(results.RESULTS / "RESULTS.md", "\n".join([head, *sections]))
    results.between_markers(ROOT / "data/README.md", _checkpoints())
    print(f"wrote README.md, data/README.md, results/RESULTS.md and the tables of {len(sections)} papers")


def _checkpoints() -> str:
    """What ships in data/checkpoints."""
    rows = []
    for path in sorted((ROOT / "data/checkpoints").glob("*.json")):
        found = results.load(path)
        parts = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in found["parameters"].items())
        samples = f"[samples](../results/backbones/{path.stem}.png)" if (results.RESULTS / f"backbones/{path.stem}.png").exists() else ""
        rows.append([f"[`{path.stem}`](checkpoints/{path.name})", parts, f"{found['seconds'] / 60:.1f} minutes", samples])
    return results.table(["", "parameters", f"`just pretrain` on {found['hardware']['cores']} cores" if rows else "", ""], rows)


def bench(argv: list[str]) -> None:
    path = results.RESULTS / "bench.json"
    found = results.load(path) if path.exists() else {}
    ours = {"common": "common.bench", "backbones": "common.backbones.bench"}
    for name in argv or [*ours, *papers.slugs()]:
        module = importlib.import_module(ours[name]) if name in ours else papers.find(name).module("eval")
        if hasattr(module, "bench"):
            found[name] = module.bench() | {"hardware": results.hardware(), "versions": results.versions(), "commit": results.commit()}
            results.save(found, path)
            print(f"{name}: {found[name]}")
        elif argv:
            raise UserError(f"{name} has nothing to bench")


def data(argv: list[str]) -> None:
    from common.data import digits, photos, text

    print("Embedded data (comes with the dependencies; hashes of the contents):")
    for name, value in (photos.hashes() | digits.hashes() | text.hashes()).items():
        print(f"  {name:<24} {value}")
    print("Real datasets are read from the directory given with --data; data/README.md has their layouts and sources.")


def new(argv: list[str]) -> None:
    from common import scaffold

    if len(argv) != 1:
        raise UserError("which name? `just new my_paper`")
    print(f"wrote {scaffold.scaffold(argv[0])}: fill in paper.toml first, then model.py")


def pretrain(argv: list[str]) -> None:
    from common.pretrain import file_of, names, recipe

    name, rest = _subject("pretrain", argv, "NAME", f"which checkpoint? `just {{}} NAME`, one of {', '.join(names())}")
    about = "Train it from scratch into data/checkpoints, and measure it."
    _, cfg = _config(f"just pretrain {name}", about, file_of(name), rest, lambda: recipe(name).SCALES, lambda scale: RUNS / name / scale)
    from common.pretrain import shipping

    found = shipping.run(name, cfg, " ".join(["just pretrain", *argv]))
    print(f"{found['seconds']:.0f} s; {found['quality']}")


COMMANDS = {
    "list": list_papers, "repro": repro, "train": train, "eval": evaluate, "smoke": smoke, "record": record, "report": report,
    "bench": bench, "data": data, "new": new, "pretrain": pretrain,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
