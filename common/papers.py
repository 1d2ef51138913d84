"""The papers as data: finds the directories under papers/ and reads their paper.toml. Imports no torch."""

import ast
import difflib
import importlib
import re
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ROOT / "papers"

# ---- rules ----------------------------------------------------------------------------------------------------------------------------

_COMPARISON = re.compile(r"(<=|>=|==|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
_HOLDS = {
    "<": lambda x, bound: x < bound,
    "<=": lambda x, bound: x <= bound,
    ">": lambda x, bound: x > bound,
    ">=": lambda x, bound: x >= bound,
    "==": lambda x, bound: x == bound,
}


@dataclass(frozen=True)
class Rule:
    """`rule := comparison ("and" comparison)*`, `comparison := (< | <= | > | >= | ==) number`, as in "> -1.5 and < 1.5"."""

    text: str

    def __post_init__(self):
        for part in self.text.split(" and "):
            if not _COMPARISON.fullmatch(part.strip()):
                raise UserError(f"the rule {self.text!r} is not of the form '< 0' or '> -1.5 and < 1.5': mend it in paper.toml")

    def holds(self, x: float) -> bool:
        parts = (_COMPARISON.fullmatch(part.strip()).groups() for part in self.text.split(" and "))
        return all(_HOLDS[sign](x, float(bound)) for sign, bound in parts)


# ---- papers ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One statement of a paper: `metric` is what eval.py measures, `rule` what it must satisfy, `paper` the paper's own figures."""

    id: str
    text: str
    paper: str
    metric: str
    rule: Rule


@dataclass(frozen=True)
class Paper:
    """paper.toml."""

    slug: str
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str
    family: str
    idea: str
    official_code: str
    weights: str
    claims: tuple[Claim, ...]
    not_tested: dict[str, str]  # claim id -> why

    @property
    def directory(self) -> Path:
        return PAPERS / self.slug

    def module(self, name: str) -> types.ModuleType:
        """papers.<slug>.<name>, imported."""
        return importlib.import_module(f"papers.{self.slug}.{name}")


def slugs() -> list[str]:
    return sorted(path.parent.name for path in PAPERS.glob("*/paper.toml"))


def find(slug: str) -> Paper:
    """Read one paper. Raises UserError for an unknown slug, with the nearest name, and for a broken paper.toml."""
    slug = slug.strip("/").removeprefix("papers/")
    path = PAPERS / slug / "paper.toml"
    if not path.is_file():
        near = difflib.get_close_matches(slug, slugs(), 1, 0.4)
        raise UserError(f"there is no paper {slug!r}: " + (f"did you mean {near[0]!r}? " if near else "") + "`just list` names them all")
    try:
        meta = tomllib.loads(path.read_text())
        claims = tuple(Claim(c["id"], c["text"], c["paper"], c["metric"], Rule(c["rule"])) for c in meta.get("claims", ()))
        not_tested = {entry["id"]: entry["why"] for entry in meta.get("not_tested", ())}
        keys = ("title", "authors", "venue", "year", "arxiv", "family", "idea")
        return Paper(slug, *(meta[k] for k in keys), meta.get("official_code", ""), meta.get("weights", ""), claims, not_tested)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML ({error}): mend it") from None
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error}: see another paper's for the form") from None


# ---- configuration without torch -------------------------------------------------------------------------------------------------------

_LIGHT = ("dataclasses", "pathlib", "typing", "common.config", "__future__")


def config(path: Path) -> tuple[type, dict[str, object]]:
    """(Config, SCALES) of a paper's train.py or of a recipe, without importing what else the file imports: --help must not wait for torch."""
    wanted = []
    for node in ast.parse(path.read_text(), str(path)).body:
        names = [t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)]
        light_import = isinstance(node, ast.ImportFrom) and node.module in _LIGHT
        if light_import or (isinstance(node, ast.ClassDef) and node.name == "Config") or "SCALES" in names:
            wanted.append(node)
    module = types.ModuleType(f"papers.{path.parent.name}.config")
    module.__file__ = str(path)  # tyro reads the fields' comments from the source
    sys.modules[module.__name__] = module
    try:
        exec(compile(ast.Module(wanted, []), str(path), "exec"), vars(module))
        return module.Config, module.SCALES
    except (NameError, AttributeError) as error:
        raise UserError(f"{path}: Config and SCALES must need no imports but {', '.join(_LIGHT[:-1])} ({error})") from None
