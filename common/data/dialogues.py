"""Scenes of everyday things and talk about them: what a small vision-language model learns from, and what it is asked.

A scene has a context, such as a kitchen. Each of the context's four things is there with probability TYPICAL, and with STRANGER one from
elsewhere. A thing is a shape in a colour, in a cell of its own of a 4 x 4 grid, with a contrast of its own; noise lies over the image.

    existence   is there a cup in the kitchen ?       yes, no
    what        what is at c7 in the kitchen ?        cup, nothing
    where       where is the cup in the kitchen ?     c7
    caption     describe the image in the kitchen .   a photo with a cup and a plate
    check       check                                 cup yes plate no ...; here the names are given
    locate      locate                                cup c7 plate c12 ...; likewise, of things that are there
    read        read                                  c7 cup c2 nothing ...; here the cells are given

Two things mislead a model by known amounts. The captions it learns from mention each *absent* thing of the context with probability
IMAGINED. The cue "in the kitchen" stands in CUED of the questions, and is right in CUE_RIGHT of those.

Scene i and dialogue i are functions of (seed, i).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.backbones.llava import Llava, Role
from common.data.scenes import SHAPES, Scene, Thing, render

# ---- scenes ---------------------------------------------------------------------------------------------------------------------------

CONTEXTS = {
    "kitchen": ("cup", "plate", "kettle", "spoon"),
    "garden": ("flower", "rake", "bench", "hose"),
    "street": ("car", "sign", "bus", "lamp"),
    "office": ("desk", "pen", "phone", "chair"),
    "beach": ("boat", "shell", "ball", "towel"),
}
FREQUENCIES = (0.32, 0.26, 0.18, 0.14, 0.10)  # of the contexts
NAMES = tuple(chain.from_iterable(CONTEXTS.values()))  # category c is of context c // 4
LOOKS = tuple((SHAPES[(c // 4 + 2 * (c % 4)) % 5], ("red", "green", "blue", "yellow")[c % 4]) for c in range(20))  # neither tells the context
TYPICAL, STRANGER = 0.75, 0.35

SIZE, PATCH, GRID = 48, 6, 4  # pixels, pixels, cells a side
SIDE = SIZE // PATCH
CELL_OF_PATCH = (torch.arange(SIDE)[:, None] * GRID // SIDE * GRID + torch.arange(SIDE) * GRID // SIDE).flatten()  # both row-major
NOISE, CONTRASTS, TINT = 0.18, (0.3, 1.0), 0.15


@dataclass(frozen=True)
class Album:
    """n scenes."""

    images: UInt8[Tensor, "n 3 size size"]
    contexts: Int[Tensor, "n"]
    cells: Int[Tensor, "n 20"]  # where each category is, row-major; -1 where it is absent

    def __len__(self) -> int:
        return len(self.images)

    @property
    def present(self) -> Bool[Tensor, "n 20"]:
        return self.cells >= 0

    @property
    def patches(self) -> Int[Tensor, "n 64"]:
        """The category in whose cell a patch lies; 20 for none."""
        here = self.cells[:, None] == CELL_OF_PATCH[:, None]
        return torch.where(here.any(-1), here.int().argmax(-1), len(NAMES))


def album(n: int, seed: int, start: int = 0, typical: float = TYPICAL) -> Album:
    """Scenes start..start+n-1, each with one to five things."""
    scenes = [_scene(np.random.default_rng((seed, i)), typical) for i in range(start, start + n)]
    return Album(*(torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True)))


def _scene(rng: np.random.Generator, typical: float) -> tuple[UInt8[np.ndarray, "3 size size"], np.int64, Int[np.ndarray, "20"]]:
    context, present = rng.choice(len(CONTEXTS), p=FREQUENCIES), []
    while not present:
        present = [c for c in members(context) if rng.random() < typical]
        present += [_pick(rng, [c for c in range(20) if c // 4 != context])] if rng.random() < STRANGER else []
    cells = np.full(20, -1)
    cells[present] = rng.permutation(GRID**2)[: len(present)]
    things = tuple(_thing(rng, *LOOKS[c], cells[c]) for c in present)
    image = render(Scene(things, "gray", tuple(rng.uniform(-TINT, TINT, 3))), SIZE).image / 255
    noisy = image + NOISE * rng.standard_normal(image.shape)
    return (255 * noisy.clip(0, 1)).round().astype(np.uint8), context, cells


def _thing(rng: np.random.Generator, shape: str, colour: str, cell: int) -> Thing:
    y, x = (np.array(divmod(cell, GRID)) + 0.5) / GRID + rng.uniform(-0.8, 0.8, 2) / SIZE
    return Thing(shape, colour, x, y, rng.uniform(4.4, 5.0) / SIZE, opacity=rng.uniform(*CONTRASTS))


def _pick(rng: np.random.Generator, options: Sequence):
    return options[rng.integers(len(options))]


def members(context: int) -> range:
    """The categories of a context."""
    return range(4 * context, 4 * context + 4)


def pixels(images: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """What an image tower takes, -1 to 1."""
    return images / 127.5 - 1


# ---- words ----------------------------------------------------------------------------------------------------------------------------

PAD, BOS, EOS, IMAGE = "<pad>", "<bos>", "<eos>", "<image>"
SYSTEM = f"{BOS} a chat about a photo . user :"
ROLE = "assistant :"  # ends a prompt
CELLS = tuple(f"c{i}" for i in range(GRID**2))
TALK = "a chat about photo . user : assistant is there in the ? what at where describe image with and check locate read yes no nothing"
WORDS = (PAD, BOS, EOS, IMAGE, *TALK.split(), *CONTEXTS, *CELLS, *NAMES)
IDS = {word: i for i, word in enumerate(WORDS)}
CONTENT = (*NAMES, *CELLS, *CONTEXTS, "describe", "image", "check", "locate", "read")  # the words that carry a question's meaning


def encode(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def decode(ids: Iterable[int]) -> str:
    """The words before the end."""
    return " ".join(WORDS[i] for i in ids).split(EOS)[0].strip()


def content(ids: Int[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
    """Which tokens are content words."""
    return torch.isin(ids, torch.tensor([IDS[word] for word in CONTENT]))


# ---- dialogues ------------------------------------------------------------------------------------------------------------------------

KINDS = {
    "existence": "is there a {subject} {cue} ?",
    "what": "what is at {subject} {cue} ?",
    "where": "where is the {subject} {cue} ?",
    "caption": "describe the image {cue} .",
}
IMAGINED, CUED, CUE_RIGHT = 0.25, 0.6, 0.8
ADVERSARIAL = 0.15  # of the questions about absent things: about one of the context
LISTS = ("check", "locate", "read")  # what makes a model look at the image soon
LISTED, TURNS = 10, 3  # entries of a list, questions of a dialogue

Turn = tuple[str, str]  # what is asked, what is answered


def question(kind: str, subject: str = "", context: int | None = None) -> str:
    """subject: a name or a cell. context: that of the cue."""
    cue = "" if context is None else f"in the {list(CONTEXTS)[context]}"
    return " ".join(KINDS[kind].format(subject=subject, cue=cue).split())


def caption(mentioned: Iterable[int]) -> str:
    return "a photo with " + " and ".join(f"a {NAMES[c]}" for c in mentioned)


def conversation(turns: Sequence[Turn]) -> list[Turn]:
    """With the roles around questions and answers; the first "user :" stands before the image."""
    return [(f"{'user : ' if k else ''}{asked} {ROLE}", f"{answered} {EOS}") for k, (asked, answered) in enumerate(turns)]


def transcript(turns: Sequence[Turn], images: bool = True) -> tuple[list[int], list[int]]:
    """Ids and roles of a dialogue; its image tokens may be left out."""
    parts = [(Role.SYSTEM, SYSTEM), (Role.IMAGE, " ".join([IMAGE] * SIDE**2 * images))]
    parts += [part for asked, answered in turns for part in ((Role.QUERY, asked), (Role.OUTPUT, answered))]
    ids = [encode(text) for _, text in parts]
    return list(chain.from_iterable(ids)), [role.value for (role, _), part in zip(parts, ids, strict=True) for _ in part]


def prompt(asked: str) -> list[int]:
    """The ids of a question, up to the answer."""
    return transcript([(f"{asked} {ROLE}", "")])[0]


class Dialogues:
    """A dataset: `each` dialogues of some kinds about every scene of an album, with or without its image tokens.

    A batch is (images, ids, roles), padded on the right. What is to be learnt is to say the tokens whose role is OUTPUT.
    """

    def __init__(self, album: Album, seed: int, each: int = 4, images: bool = True, kinds: tuple[str, ...] = (*LISTS, "caption", "questions")):
        self.album, self.seed, self.each, self.images, self.kinds = album, seed, each, images, kinds

    def __len__(self) -> int:
        return self.each * len(self.album)

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[UInt8[Tensor, "b 3 size size"], Int[Tensor, "b n"], Int[Tensor, "b n"]]:
        spoken = zip(*(transcript(self.turns(i), self.images) for i in indices.tolist()), strict=True)
        ids, roles = (pad_sequence([torch.tensor(row) for row in rows], batch_first=True) for rows in spoken)
        return self.album.images[indices // self.each], ids, roles

    def turns(self, index: int) -> list[Turn]:
        """Dialogue `index`: one list, one caption, or questions about different things."""
        rng, scene = np.random.default_rng((self.seed, index)), index // self.each
        context, cells = int(self.album.contexts[scene]), self.album.cells[scene].tolist()
        kind = _pick(rng, self.kinds)
        if kind in LISTS:
            return _list(rng, kind, cells)
        if kind == "caption":
            mentioned = [c for c in range(20) if cells[c] >= 0 or (c in members(context) and rng.random() < IMAGINED)]
            return conversation([(question("caption", context=_cue(rng, context)), caption(mentioned))])
        here = [c for c in rng.permutation(20) if cells[c] >= 0]
        return conversation([_question(rng, context, cells, c) for c in here[:TURNS]])


def _list(rng: np.random.Generator, kind: str, cells: Sequence[int]) -> list[Turn]:
    """All that is there, in any order; to check and to read, among some that is not."""
    here = {CELLS[cell]: NAMES[c] for c, cell in enumerate(cells) if cell >= 0}
    entries = {
        "check": [(name, "yes" if name in here.values() else "no") for name in NAMES],
        "locate": [(name, cell) for cell, name in here.items()],
        "read": [(cell, here.get(cell, "nothing")) for cell in CELLS],
    }[kind]
    there = {*here, *here.values()}
    listed = sorted(rng.permutation(len(entries)), key=lambda k: entries[k][0] not in there)[:LISTED]
    turns = [entries[k] for k in rng.permutation(listed)]
    asked, answered = [subject for subject, _ in turns], [answer for _, answer in turns]
    return list(zip([f"{kind} {ROLE} {asked[0]}", *asked[1:]], [*answered[:-1], f"{answered[-1]} {EOS}"], strict=True))


def _question(rng: np.random.Generator, context: int, cells: Sequence[int], c: int) -> Turn:
    """About category c, or where that serves as well about an absent one or an empty cell."""
    kind, cue, flipped = _pick(rng, ("existence", "existence", "what", "where")), _cue(rng, context), rng.random()
    if kind == "existence" and flipped < 0.5:
        typical = [a for a in members(context) if cells[a] < 0]
        strange = [a for a in range(20) if cells[a] < 0 and a // 4 != context]
        return question(kind, NAMES[_pick(rng, typical if typical and rng.random() < ADVERSARIAL else strange)], cue), "no"
    if kind == "what" and flipped < 0.2:
        return question(kind, CELLS[_pick(rng, [cell for cell in range(GRID**2) if cell not in cells])], cue), "nothing"
    if kind == "what":
        return question(kind, CELLS[cells[c]], cue), NAMES[c]
    return question(kind, NAMES[c], cue), "yes" if kind == "existence" else CELLS[cells[c]]


def _cue(rng: np.random.Generator, context: int) -> int | None:
    if rng.random() >= CUED:
        return None
    return context if rng.random() < CUE_RIGHT else _pick(rng, [k for k in range(len(CONTEXTS)) if k != context])


# ---- evaluation -----------------------------------------------------------------------------------------------------------------------

SPLITS = ("random", "popular", "adversarial", "wrong cue")


class Question(NamedTuple):
    scene: int  # of the album
    category: int  # asked about; -1 for a caption
    text: str
    answer: str


def existence(album: Album, split: str, seed: int = 0) -> list[Question]:
    """Two questions a scene, about a thing that is there (the same in POPE's three splits) and about one that is not.

    The absent thing is any ("random"), of the two most frequent contexts ("popular") or of the scene's own ("adversarial"). "wrong cue"
    asks with the cue of a context of which nothing is there, and for an absent thing of that one. Scenes that lack nothing of their
    context are left out.
    """
    questions = []
    for i, (context, cells) in enumerate(zip(album.contexts.tolist(), album.cells.tolist(), strict=True)):
        rng, here = np.random.default_rng((seed, i)), [c for c in range(20) if cells[c] >= 0]
        other = _pick(rng, [k for k in range(len(CONTEXTS)) if k != context and not set(members(k)) & set(here)])
        pool = {"random": range(20), "popular": range(8), "adversarial": members(context), "wrong cue": members(other)}[split]
        cue = other if split == "wrong cue" else None
        if set(members(context)) - set(here):
            asked = {"yes": _pick(rng, here), "no": _pick(rng, [c for c in pool if c not in here])}
            questions += [Question(i, c, question("existence", NAMES[c], cue), answer) for answer, c in asked.items()]
    return questions


def grounded(album: Album, kind: str, seed: int = 0) -> list[Question]:
    """One question a scene, kind "what" or "where", about a thing that is there."""
    questions = []
    for i, cells in enumerate(album.cells.tolist()):
        c = _pick(np.random.default_rng((seed, i)), [c for c in range(20) if cells[c] >= 0])
        subject, answer = (NAMES[c], CELLS[cells[c]])[:: -1 if kind == "what" else 1]
        questions.append(Question(i, c, question(kind, subject), answer))
    return questions


def captions(album: Album) -> list[Question]:
    """A request for a caption a scene; its answer is the true one."""
    return [Question(i, -1, question("caption"), caption(here.nonzero()[:, 0].tolist())) for i, here in enumerate(album.present)]


def answers(model: Llava, album: Album, questions: Sequence[Question], batch: int = 64, longest: int = 40) -> list[str]:
    """What the model says, greedily. Prompts of one length go together, so that none is padded."""
    prompts = [prompt(q.text) for q in questions]
    order, said = sorted(range(len(questions)), key=lambda i: len(prompts[i])), [""] * len(questions)
    for _, same in groupby(order, key=lambda i: len(prompts[i])):
        for chunk in torch.tensor(list(same)).split(batch):
            ids, scenes = torch.tensor([prompts[i] for i in chunk]), [questions[i].scene for i in chunk]
            spoken = model.generate(ids, pixels(album.images[scenes]), max_new_tokens=longest)
            for i, row in zip(chunk.tolist(), spoken.tolist(), strict=True):
                said[i] = decode(row)
    return said


def mentioned(text: str) -> list[str]:
    """The names in it, as often as they come."""
    return [word for word in text.split() if word in NAMES]
