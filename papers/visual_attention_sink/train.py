"""The method trains nothing. What is fitted here are the sinks that a control experiment implants in a model that has none of its own."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from common import gpu
from common.attention import controlled
from common.backbones.llama import Llama
from common.backbones.llava import Llava
from common.config import RunConfig
from common.data import Batches, dialogues
from common.data.dialogues import IDS, NAMES, Album, Question, answers, mentioned, pixels
from common.errors import UserError
from common.hallucination import chair, pope, said_yes
from common.loop import each, fit
from papers.visual_attention_sink.model import Implant, first_token, sink_channels


@dataclass
class Config(RunConfig):
    """The settings of VAR are those of the paper for tests of hallucination."""

    scenes: int = 120  # to measure on; each seed has its own
    rho: float = 0.5  # ρ for questions of existence and captions
    rho_general: float = 0.8  # ρ for other questions
    p: float = 0.6  # share of the sinks' weight that moves
    draws: int = 3  # of random tokens to knock out
    implants: int = 3  # sinks in each image of the control experiment
    tau: float = 0.5  # τ / √D in it, between the implants and all other tokens
    height: float = 20.0  # what their channels gain, in RMS
    share: float = 0.4  # of the weight on the image that they are to take, in every head
    learn_from: int = 256  # scenes to fit that share on
    timed: int = 32  # tokens to decode where that is timed
    max_new_tokens: int = 128  # with --weights
    limit: int | None = None  # with --weights: so many questions of each category


SCALES = {
    "smoke": Config(steps=4, batch=2, lr=0.3, weight_decay=0.0, scenes=3, learn_from=8, draws=1, timed=2, seeds=(0,), processes=1),
    "small": Config(steps=60, batch=8, lr=0.5, weight_decay=0.0, seeds=(0, 1, 2, 3, 4)),
    "full": Config(steps=200, batch=16, lr=0.3, weight_decay=0.0, seeds=tuple(range(10)), scenes=2000),
}

SPLITS = ("random", "popular", "adversarial")
HELD_OUT, LEARNT = 1000, 2000  # seeds of scenes, plus the run's seed
IMAGE = slice(len(dialogues.encode(dialogues.SYSTEM)), len(dialogues.encode(dialogues.SYSTEM)) + dialogues.SIDE**2)  # in every prompt
run_name = "implant/{}".format


def train(cfg: Config) -> None:
    each(train_one, [(seed,) for seed in cfg.seeds], cfg)


def train_one(cfg: Config, seed: int) -> None:
    """Fit b of `Implant` until the implants take cfg.share in each head of each layer."""
    gpu.seed_everything(seed)
    llava = backbone(gpu.device(cfg))
    album = dialogues.album(cfg.learn_from, LEARNT + seed)
    questions = dialogues.existence(album, "random", seed)
    scenes = torch.tensor([q.scene for q in questions])
    prompts = torch.tensor([dialogues.prompt(q.text) for q in questions])
    dataset = TensorDataset(album.images[scenes], prompts, background(album, cfg.implants, seed)[scenes])

    def loss(implant: Implant, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, ids, implant.places = batch
        with controlled(llava.language_model, implant):
            llava(ids, pixels(images))
        return (torch.stack(implant.shares) - cfg.share).square().mean()

    fit(build(cfg, llava.language_model), loss, Batches(dataset, cfg.batch, seed), cfg, run_name(seed))


@cache
def backbone(on: torch.device) -> Llava:
    """The small model that ships, not to be trained."""
    return Llava.from_pretrained("tiny").to(on).requires_grad_(False)


def build(cfg: Config, llama: Llama) -> Implant:
    return Implant(llama, IMAGE, sink_channels(first_token(llama, IDS[dialogues.BOS])), cfg.height)


def background(album: Album, k: int, seed: int) -> Int[Tensor, "n k"]:
    """Prompt positions of k patches of each image on which nothing lies, drawn by (seed, scene)."""
    draw = torch.rand(album.patches.shape, generator=torch.Generator().manual_seed(seed))
    return IMAGE.start + draw.masked_fill(album.patches < len(NAMES), -1.0).topk(k).indices


# ---- questions --------------------------------------------------------------------------------------------------------------------------


class Exam(NamedTuple):
    """What one seed asks."""

    album: Album
    existence: dict[str, list[Question]]  # "yes": about what is there; POPE's splits: about what is not
    what: list[Question]
    captions: list[Question]


def exam(cfg: Config, seed: int) -> Exam:
    album = dialogues.album(cfg.scenes, HELD_OUT + seed)
    sets = {split: dialogues.existence(album, split, seed) for split in SPLITS}
    asked = {"yes": [q for q in sets["random"] if q.answer == "yes"]}  # the same in all
    asked |= {split: [q for q in questions if q.answer == "no"] for split, questions in sets.items()}
    return Exam(album, asked, dialogues.grounded(album, "what", seed), dialogues.captions(album))


Setting = Callable[[Int[Tensor, "b"]], AbstractContextManager]  # scenes of a batch -> what happens to the model meanwhile


def plain(scenes: Int[Tensor, "b"]) -> AbstractContextManager:
    return nullcontext()


class Existence:
    """The questions about existence with their images embedded, to be asked in many settings. All have as many words."""

    @torch.inference_mode()
    def __init__(self, llava: Llava, test: Exam):
        self.llama, questions = llava.language_model, [q for part in test.existence.values() for q in part]
        self.scenes = torch.tensor([q.scene for q in questions])
        self.yes = torch.tensor([q.answer == "yes" for q in questions])
        self.parts = {name: len(part) for name, part in test.existence.items()}
        ids = torch.tensor([dialogues.prompt(q.text) for q in questions])
        chunks = zip(ids.split(64), self.scenes.split(64), strict=True)
        self.x = torch.cat([llava.embed(rows, pixels(test.album.images[scenes])) for rows, scenes in chunks])
        self.usual = self.log_odds(plain)

    def __call__(self, setting: Setting) -> dict[str, float]:
        """accuracy by POPE's splits in percent and "accuracy", their mean; "belief", the mean probability of the right one of yes and no in
        percent; "change", the mean |log-odds - those of the model left alone|.
        """
        odds = self.log_odds(setting)
        right = torch.where(self.yes, odds, -odds).double().sigmoid().split(list(self.parts.values()))
        hits, beliefs = ({n: 50 * f(r).double().mean().item() for n, r in zip(self.parts, right, strict=True)} for f in (torch.round, torch.clone))
        by_split = {split: hits["yes"] + hits[split] for split in SPLITS}
        belief = fmean(beliefs["yes"] + beliefs[split] for split in SPLITS)
        return by_split | {"accuracy": fmean(by_split.values()), "belief": belief, "change": (odds - self.usual).abs().mean().item()}

    @torch.inference_mode()
    def log_odds(self, setting: Setting) -> Float[Tensor, "q"]:
        """Of yes against no."""
        found = []
        for x, scenes in zip(self.x.split(64), self.scenes.split(64), strict=True):
            with setting(scenes):
                last = self.llama(x)[:, -1]
            found.append(last[:, IDS["yes"]] - last[:, IDS["no"]])
        return torch.cat(found)


@torch.inference_mode()
def ask(llava: Llava, album: Album, questions: list[Question], setting: Setting, longest: int, batch: int = 64) -> list[str]:
    """What the model says, greedily. The questions have as many words each."""
    said = []
    for start in range(0, len(questions), batch):
        asked = questions[start : start + batch]
        with setting(torch.tensor([q.scene for q in asked])):
            said += answers(llava, album, asked, batch, longest)
    return said


def what(llava: Llava, test: Exam, setting: Setting) -> float:
    """Accuracy on "what is at c7 ?", in percent."""
    said = ask(llava, test.album, test.what, setting, 2)
    return 100 * fmean(answer == q.answer for answer, q in zip(said, test.what, strict=True))


def captions(llava: Llava, test: Exam, setting: Setting) -> dict[str, float]:
    """CHAIR, in percent."""
    there = [{NAMES[c] for c in here.nonzero()[:, 0]} for here in test.album.present]
    rates = chair([mentioned(said) for said in ask(llava, test.album, test.captions, setting, 40)], there)
    return {name: 100 * rates[name] for name in ("chair_i", "chair_s", "recall")}


# ---- the layout of published benchmarks -------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A line of a published question file."""

    id: str
    image: Path
    question: str
    label: str | None


KEYS = {"id": ("qid", "question_id"), "image": ("image",), "question": ("text", "question", "prompt"), "label": ("label", "answer")}


def question_files(root: Path) -> dict[str, list[Item]]:
    """By category: root/Questions/<category>-questions.jsonl, whose lines name files in root/Images. Raises UserError."""
    files = sorted((root / "Questions").glob("*-questions.jsonl"))
    if not files:
        raise UserError(f"--data {root}: no Questions/<category>-questions.jsonl there; give a directory with Questions/ and Images/")
    return {file.name.removesuffix("-questions.jsonl"): _items(root, file) for file in files}


def _items(root: Path, file: Path) -> list[Item]:
    items = [_item(root, file, i, line) for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not items:
        raise UserError(f"{file} holds no question: fetch it again")
    return items


def _item(root: Path, file: Path, number: int, line: str) -> Item:
    try:
        row = json.loads(line)
        found = {field: next((str(row[key]) for key in keys if row.get(key) is not None), None) for field, keys in KEYS.items()}
    except (ValueError, AttributeError):
        raise UserError(f"{file}, line {number} is not a json object: fetch the file again") from None
    if missing := [" or ".join(keys) for field, keys in KEYS.items() if found[field] is None and field != "label"]:
        raise UserError(f"{file}, line {number} lacks {', '.join(missing)}: is it a question file?")
    return Item(found["id"], root / "Images" / found["image"], found["question"], found["label"])


def picture(file: Path, size: int) -> Float[Tensor, "1 3 size size"]:
    """As LLaVA-1.5 sees it: padded to a square in the mean colour, then resized. Raises UserError."""
    try:
        image = Image.open(file).convert("RGB")
    except OSError as error:
        raise UserError(f"{file} cannot be read as an image ({error}): fetch it again") from None
    square = Image.new("RGB", (max(image.size),) * 2, tuple(int(255 * c) for c in OPENAI_CLIP_MEAN))
    square.paste(image, tuple((square.width - side) // 2 for side in image.size))
    steps = [transforms.Resize(size, InterpolationMode.BICUBIC), transforms.ToTensor(), transforms.Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)]
    return transforms.Compose(steps)(square)[None]


def score(answers: list[str], labels: list[str | None]) -> dict[str, float]:
    """Of answers without labels there is none."""
    if None in labels:
        return {}
    if {label.lower() for label in labels} <= {"yes", "no"}:
        return pope([said_yes(answer) for answer in answers], [label.lower() == "yes" for label in labels])
    return {"accuracy": fmean(a.strip(" .\n").lower() == b.strip(" .\n").lower() for a, b in zip(answers, labels, strict=True))}
