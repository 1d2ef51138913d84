"""tiny-vlm: a LLaVA of 0.9 M parameters that talks about small scenes, and now and then of what is not there.

    see     the image tower alone: class token -> the things that are there; patches -> the thing in whose cell they lie, and that cell
    talk    the language model alone, on dialogues without their images: it learns what to expect
    align   the projector alone: patch -> embedding of its thing's name + embedding of its cell's
    point   all together, on lists of where things are
    read    all together, on these and on lists of what is where
    look    all together, on all dialogues with their images

Without "point" and "read" it learns what is there but never where: other dialogues drown these few words before they are learnt.

The world, the dialogues and the questions are those of common/data/dialogues.py. Floors ("blind") are the same model's answers for gray
images. Ceilings are, for existence, what a linear classifier of the tower's patches would answer ("probe"), and for captions the true and
the learnt ones.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common import results
from common.attention import Site, controlled
from common.backbones.clip import CLIPVision, CLIPVisionConfig
from common.backbones.llama import Llama, LlamaConfig
from common.backbones.llava import Llava, LlavaConfig, LlavaProjector, Role
from common.config import RunConfig
from common.data import Batches, dialogues
from common.data.dialogues import CELL_OF_PATCH, CELLS, NAMES, SIDE, Album, Dialogues, Question, answers, mentioned, pixels
from common.gpu import seed_everything
from common.hallucination import chair, pope, said_yes
from common.layers import init_by_fan_in
from common.loop import fit


@dataclass
class Config(RunConfig):
    seeds: tuple[int, ...] = (0,)
    steps: int = 2600  # of the last stage
    see: int = 1500  # of the stages before it
    talk: int = 400
    align: int = 300
    point: int = 400
    read: int = 600
    batch: int = 8
    lr: float = 3e-3
    joint_lr: float = 1.5e-3  # of the stages that train all together
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    scenes: int = 12_000  # to learn from
    width: int = 96  # of the language model
    depth: int = 6
    heads: int = 6


SCALES = {
    "smoke": Config(steps=2, see=2, talk=2, align=2, point=2, read=2, batch=4, scenes=16, width=24, depth=2),
    "small": Config(),
}
COMPONENTS = {"": Llava}
TRAINING, HELD_OUT = 1, 2  # seeds of scenes
SCENES = 300  # to measure on


def train(cfg: Config) -> dict[str, Llava]:
    seed_everything(cfg.seeds[0])
    model, scenes = build(cfg), dialogues.album(cfg.scenes, TRAINING)
    tower, language = model.vision_tower, model.language_model

    def stage(name: str, part: nn.Module, loss, dataset, steps: int, lr: float = cfg.lr, **options) -> nn.Module:
        return fit(part, loss, Batches(dataset, cfg.batch, cfg.seeds[0]), replace(cfg, steps=steps, lr=lr), name, **options)

    labelled = TensorDataset(scenes.images, scenes.present, scenes.patches)
    stage("see", Seer(tower), Seer.loss, labelled, cfg.see)
    stage("talk", language, talk_loss, Dialogues(scenes, 0, images=False), cfg.talk)
    names, cells = (language.model.embed_tokens.weight[[dialogues.IDS[w] for w in words]].detach() for words in ((*NAMES, "nothing"), CELLS))

    def align_loss(projector: LlavaProjector, batch: tuple) -> Tensor:
        images, _, patches = batch
        with torch.no_grad():
            z = tower(pixels(images), model.config.vision_feature_layer)[:, 1:]
        return F.mse_loss(projector(z), names[patches] + cells[CELL_OF_PATCH])

    stage("align", model.multi_modal_projector, align_loss, labelled, cfg.align)
    slow = lambda name, parameter: 0.3 if name.startswith("vision_tower") else 1.0
    together = partial(stage, part=model, loss=look_loss, lr=cfg.joint_lr, lr_scale=slow)
    together("point", dataset=Dialogues(scenes, 2, kinds=("locate",)), steps=cfg.point)
    together("read", dataset=Dialogues(scenes, 3, kinds=("locate", "read")), steps=cfg.read)
    return {"": together("look", dataset=Dialogues(scenes, 1), steps=cfg.steps)}


def build(cfg: Config) -> Llava:
    text = LlamaConfig(len(dialogues.WORDS), cfg.width, 8 * cfg.width // 3, cfg.depth, cfg.heads, eos_token_id=dialogues.IDS[dialogues.EOS])
    vision = CLIPVisionConfig(64, 256, 4, 4, dialogues.SIZE, dialogues.PATCH, hidden_act="gelu", projection_dim=64)
    model = init_by_fan_in(Llava(LlavaConfig(text, vision, image_token_index=dialogues.IDS[dialogues.IMAGE])))
    nn.init.normal_(model.vision_tower.vision_model.embeddings.position_embedding.weight, std=0.2)  # what a patch shows says more than where
    look_alike(model.language_model)
    return model


@torch.no_grad()
def look_alike(language: Llama) -> None:
    """Half of the heads of the first half of the layers look, wherever they stand, at tokens like their own.

    With W_q = W_k = P the product of query i and key j is xᵢᵀPᵀP xⱼ, largest where the two are alike; P fills the planes of a head that
    turn too slowly for the distance to matter. A name thus finds the patches that show its thing, once these resemble it.
    """
    c = language.config
    slow = torch.arange(c.head_dim).view(2, 2, -1)[:, 1].flatten()  # the second half of the planes (i, i + d/2)
    for layer in language.model.layers[: c.num_hidden_layers // 2]:
        q, k = (p.weight.view(-1, c.head_dim, c.hidden_size)[: c.num_attention_heads // 2] for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        q.mul_(0.3)
        q[:, slow] = 0.2 * torch.randn(len(q), len(slow), c.hidden_size)
        k[:, slow] = q[:, slow]


class Seer(nn.Module):
    """The image tower with three heads: tags read the class token of the last state, labels and places the patches that LLaVA reads."""

    def __init__(self, tower: CLIPVision):
        super().__init__()
        self.tower, width = tower, tower.config.hidden_size
        self.tags, self.labels, self.places = nn.Linear(width, len(NAMES)), nn.Linear(width, len(NAMES) + 1), nn.Linear(width, len(CELLS))

    def loss(self, batch: tuple) -> dict[str, Tensor]:
        images, present, patches = batch
        vision, states = self.tower.vision_model, self.tower(pixels(images), -2)
        last = vision.post_layernorm(vision.encoder.layers[-1](states, causal=False)[:, 0])
        return {
            "tags": F.binary_cross_entropy_with_logits(self.tags(last), present.float()),
            "labels": F.cross_entropy(self.labels(states[:, 1:]).flatten(0, 1), patches.flatten()),
            "places": F.cross_entropy(self.places(states[:, 1:]).flatten(0, 1), CELL_OF_PATCH.repeat(len(images))),
        }


def talk_loss(model: Llama, batch: tuple) -> Tensor:
    _, ids, roles = batch
    return next_token_loss(model(ids), ids, roles)


def look_loss(model: Llava, batch: tuple) -> Tensor:
    images, ids, roles = batch
    return next_token_loss(model(ids, pixels(images)), ids, roles)


def next_token_loss(logits: Float[Tensor, "b n vocab"], ids: Int[Tensor, "b n"], roles: Int[Tensor, "b n"]) -> Tensor:
    """Mean cross-entropy of the tokens that the model is to say."""
    said = roles[:, 1:] == Role.OUTPUT
    return F.cross_entropy(logits[:, :-1][said], ids[:, 1:][said])


def data(cfg: Config) -> dict[str, str]:
    scenes = dialogues.album(min(cfg.scenes, 64), TRAINING)
    spoken = Dialogues(scenes, 1).batch(torch.arange(64))
    return {"dialogues": results.content_hash(*spoken)}


# ---- quality --------------------------------------------------------------------------------------------------------------------------


def measure(models: dict[str, Llava]) -> dict[str, float]:
    model, album = models[""], dialogues.album(SCENES, HELD_OUT)
    blind = replace(album, images=torch.full_like(album.images, 128))
    sets = {split: dialogues.existence(album, split) for split in dialogues.SPLITS}
    found = judge(model, album, sets) | {f"{name}, blind": value for name, value in judge(model, blind, sets).items()}
    seen = probe(model, album)
    for split, questions in sets.items():
        right = [seen[q.scene, q.category].item() == (q.answer == "yes") for q in questions]
        found[f"{split}: accuracy, probe"] = float(np.mean(right))
    learnt = Dialogues(album, 0)
    told = [(i // 4, turns[0][1]) for i in range(len(learnt)) if (turns := learnt.turns(i))[0][0].startswith("describe")]
    rates = chair([mentioned(text) for _, text in told], [names(album)[i] for i, _ in told])
    return found | {f"captions: {name}, learnt": value for name, value in rates.items()}


def judge(model: Llava, album: Album, sets: dict[str, list[Question]]) -> dict[str, float]:
    """All figures that answers and captions have."""
    found = {}
    for split, questions in sets.items():
        rates = pope([said_yes(text) for text in answers(model, album, questions, longest=3)], [q.answer == "yes" for q in questions])
        found |= {f"{split}: {name}": rates[name] for name in ("accuracy", "f1", "yes_rate")}
    for kind in ("what", "where"):
        questions = dialogues.grounded(album, kind)
        found[f"{kind}: accuracy"] = float(
            np.mean([q.answer == text for q, text in zip(questions, answers(model, album, questions, longest=3), strict=True)])
        )
    texts = answers(model, album, dialogues.captions(album))
    found |= {f"captions: {name}": value for name, value in chair([mentioned(text) for text in texts], names(album)).items()}
    present = [q for q in sets["random"] if q.answer == "yes"]
    found["gaze: on the thing, best layer"] = on_target(gaze(model, album, present), album, present).mean(0).max().item()
    return found | {"captions: words": float(np.mean([len(text.split()) for text in texts]))}


def names(album: Album) -> list[set[str]]:
    """Of the things in each scene."""
    return [{NAMES[c] for c in here.nonzero()[:, 0]} for here in album.present]


def probe(model: Llava, album: Album) -> Tensor:
    """Which things a linear classifier of the tower's patches sees, learnt on 300 other scenes: those that win a cell."""
    z = lambda album: model.vision_tower(pixels(album.images), model.config.vision_feature_layer)[:, 1:]
    others = dialogues.album(300, TRAINING)
    with torch.no_grad():
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(z(others).flatten(0, 1), others.patches.flatten())
        scores = torch.from_numpy(classifier.decision_function(z(album).flatten(0, 1)))
    cells = rearrange(scores, "(n h a w b) c -> n (h w) (a b) c", n=len(album), h=4, a=2, w=4, b=2).mean(2).argmax(-1)
    return (cells[..., None] == torch.arange(len(NAMES))).any(1)


class Gaze:
    """A control that records how much the last token looks at the image's patches, mean over heads, of each layer in turn."""

    def __init__(self, image: Int[Tensor, "64"]):
        self.image, self.layers = image, []

    def weights(self, site: Site, p: Float[Tensor, "b h n m"]) -> None:
        self.layers.append(p[:, :, -1, self.image].mean(1))


@torch.no_grad()
def gaze(model: Llava, album: Album, questions: Sequence[Question]) -> Float[Tensor, "q layers 64"]:
    """Attention from the end of each prompt to the image; the questions have as many words each."""
    ids = torch.tensor([dialogues.prompt(q.text) for q in questions])
    with controlled(model.language_model, Gaze((ids[0] == model.config.image_token_index).nonzero()[:, 0])) as seen:
        model(ids, pixels(album.images[[q.scene for q in questions]]))
    return torch.stack(seen.layers, 1)


def on_target(maps: Float[Tensor, "q layers 64"], album: Album, questions: Sequence[Question]) -> Float[Tensor, "q layers"]:
    """The share of the attention to the image that falls on the thing asked about."""
    target = album.patches[[q.scene for q in questions]] == torch.tensor([q.category for q in questions])[:, None]
    return (maps * target[:, None]).sum(-1) / maps.sum(-1)


# ---- samples --------------------------------------------------------------------------------------------------------------------------


def sheet(models: dict[str, Llava]) -> Figure:
    """Scenes with their captions, and where the answer to a question looks: the deeper half of the layers."""
    model, album = models[""], dialogues.album(40, HELD_OUT)
    questions = dialogues.existence(album, "adversarial")[:16]
    maps, said = gaze(model, album, questions), answers(model, album, questions)
    here, texts = names(album), answers(model, album, dialogues.captions(album))
    figure = Figure(figsize=(15, 14), layout="constrained")
    for k, axes in enumerate(figure.subplots(4, 6).reshape(8, 3)):
        scene = questions[2 * k].scene
        told = " ".join(f"[{word}]" if word in NAMES and word not in here[scene] else word for word in texts[scene].split())
        axes[0].imshow(album.images[scene].permute(1, 2, 0).numpy())
        axes[0].set_title(textwrap.fill(told, 32), fontsize=9)
        axes[0].set_xlabel(textwrap.fill("there: " + ", ".join(sorted(here[scene], key=NAMES.index)), 32), fontsize=8)
        for i in (2 * k, 2 * k + 1):
            axis = axes[1 + i % 2]
            axis.imshow(maps[i, maps.shape[1] // 2 :].mean(0).view(SIDE, SIDE).numpy())
            axis.set_title(f"{questions[i].text}\n{said[i]}{'' if said[i] == questions[i].answer else ' (wrong)'}", fontsize=9)
            for y, x in (album.patches[scene] == questions[i].category).view(SIDE, SIDE).nonzero().tolist():
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="w"))
        for axis in axes:
            axis.set(xticks=[], yticks=[])
    return figure
