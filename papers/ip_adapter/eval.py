"""Measure IP-Adapter's claims by drawing scenes; a published adapter by CLIP-I and CLIP-T on COCO."""

import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from common import gpu
from common.backbones.clip import CLIP
from common.backbones.sd_unet import UNet2DConditionModel, UNetConfig
from common.data import scenes
from common.errors import UserError
from common.loop import load_run
from common.pictures import as_png, from_png
from common.reader import Reader, lpips, read, truth
from common.results import Measured, content_hash
from common.stable_diffusion import StableDiffusion
from papers.ip_adapter.model import ImageProjection, IPAdapter, SimpleAdapter, image_features, load_adapter, no_image, sample, shortened
from papers.ip_adapter.train import FRAME, WIDTH, Config, base, build, clip_pixels, features, read_image, scene_set, tower

LAMBDAS = (0.25, 0.5, 0.75, 1.0)
SEEN = ("colour", "texture", "background")  # what the image prompts carry and no text of C1-C4 says
SHOWN = 5  # rows of the figure
EXACT = 8  # samples compared bit for bit

Images = Float[Tensor, "b 3 H W"]
Draws = dict[tuple[str, str], Images]  # (setting, arm) -> samples

# ---- the claims -------------------------------------------------------------------------------------------------------------------------


def evaluate(cfg: Config) -> Measured:
    if cfg.data:
        raise UserError("the claims are judged without --data; for COCO give an adapter: `just eval ip_adapter --weights FILE --data DIR`")
    task = Task(cfg)
    fixed = task.base_draws()
    draws = [fixed | task.seed_draws(seed) for seed in cfg.seeds]
    known = {key: task.measure(key[0], images) for key, images in fixed.items()}
    runs = [known | {key: task.measure(key[0], images) for key, images in drawn.items() if key not in known} for drawn in draws]

    at = lambda setting, arm, name="seen": [run[setting, arm][name] for run in runs]
    less = lambda a, b: [x - y for x, y in zip(a, b, strict=True)]
    ratio = lambda a, b: [x / y for x, y in zip(a, b, strict=True)]
    plus = lambda name: less(at("alone", "plus", name), at("alone", "decoupled", name))
    framed, unframed, both = (at("told", arm, "border") for arm in ("restyled", "decoupled", "decoupled, restyled"))
    trainable = {arm: gpu.count_params(build(cfg, arm)) for arm in ("decoupled", "finetuned")}
    values = {
        "C1": less(at("alone", "decoupled"), map(max, at("alone", "simple"), at("alone", "none"))),
        "C2": less(at("alone", "decoupled"), at("alone", "finetuned")),
        "C2b": trainable["decoupled"] / trainable["finetuned"],
        "C3": less(at("told", "decoupled"), at("told", "simple")),
        "C4": ratio(at("told", "decoupled, restyled", "inside"), at("told", "decoupled", "inside")),
        "C4b": ratio(less(unframed, both), less(unframed, framed)),
        "C6": [trade_off([run["mixed", str(scale)] for scale in (0.0, *LAMBDAS)]) for run in runs],
        "C6b": max(task.difference_at_zero(seed) for seed in cfg.seeds),
        "C7": less(at("whole", "none", "text"), at("whole", "finetuned", "text")),
        "C8": plus("similarity"),
        "C8b": plus("diversity"),
        "E1": round(published_size() / 1e6, 1),
    }
    table = {}
    for (setting, arm), measured in runs[0].items():
        table.setdefault(setting, {})[arm] = {name: at(setting, arm, name) for name in measured}
    details = {"table": table, "trainable": trainable, "picture": task.picture(draws[0]), "texts": task.texts["mixed"][:SHOWN]}
    made = scene_set(cfg.train_scenes, 1)
    hashes = {"scenes train": content_hash(made.images, *(text.encode() for text in made.captions)), "image prompts": content_hash(task.images)}
    return Measured(values, details, hashes)


def trade_off(sweep: Sequence[dict[str, float]]) -> float:
    """The lesser rank correlation with λ: of the similarity to the image, and, negated, of what is right of the text."""
    return min(rank_correlation([at["similarity"] for at in sweep]), -rank_correlation([at["text"] for at in sweep]))


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's with 0, 1, 2, ...; 0 where all are equal."""
    return float(spearmanr(range(len(values)), values).statistic) if len(set(values)) > 1 else 0.0


def published_size() -> int:
    """Parameters of the adapter of Stable Diffusion 1.5 with ViT-H's embedding."""
    with gpu.on_meta():
        unet = UNet2DConditionModel(UNetConfig())
        return gpu.count_params(IPAdapter(ImageProjection(1024, unet.config.cross_attention_dim), unet))


# ---- drawing ----------------------------------------------------------------------------------------------------------------------------


def asked_by(scene: scenes.Scene, background: bool) -> str:
    """A text that leaves colour and texture open."""
    ground = f" on a {scene.background} background" if background else ""
    return f"{scenes.describe(scene.things[0], full=False)} at the {scenes.layout_of(scene)}{ground}"


def another(scene: scenes.Scene, seed: int) -> scenes.Scene:
    """With another shape, place and background: what a text may ask for beside the image."""
    rng, thing = random.Random(seed), scene.things[0]
    other = lambda options, value: rng.choice([option for option in options if option != value])
    x, y = scenes.PLACES[other(scenes.PLACES, scenes.layout_of(scene))]
    thing = thing._replace(shape=other(scenes.SHAPES, thing.shape), x=x, y=y)
    return scene._replace(things=(thing,), background=other(scenes.BACKGROUNDS, scene.background))


# what is judged of the texts: the small base draws shapes at chance, so they do not count
TOLD = {"alone": ("layout",), "told": ("layout",), "mixed": ("layout", "background"), "whole": ("layout", *SEEN)}


class Task:
    """Held-out image prompts, texts for them, and the same noise for every model.

    Settings: "alone", the empty text, several draws of each; "told", shape and place of the image; "mixed", another shape, place and
    background; "whole", a caption that leaves nothing open, without the image.
    """

    def __init__(self, cfg: Config):
        self.cfg, self.sd, self.on = cfg, base(cfg.base).to(gpu.device(cfg)), gpu.device(cfg)
        self.reader = Reader.from_pretrained("tiny").to(self.on)
        made = scene_set(cfg.prompts, 2)
        mixed = [another(scene, i) for i, scene in enumerate(made.scenes)]
        self.texts = {
            "alone": [""] * cfg.prompts * cfg.draws,
            "told": [asked_by(scene, background=False) for scene in made.scenes],
            "mixed": [asked_by(scene, background=True) for scene in mixed],
            "whole": [scenes.full_caption(scene) for scene in made.scenes],
        }
        self.rows = torch.arange(cfg.prompts).repeat(cfg.draws)
        self.images, self.shown = (made.images[self.rows] / 255).to(self.on), truth(made.scenes)[self.rows].to(self.on)
        self.asked = dict.fromkeys(self.texts, self.shown) | {"mixed": truth(mixed).to(self.on)}
        self.noise = self.sd.noise(len(self.rows), seed=2)

    def load(self, variant: str, seed: int) -> SimpleAdapter:
        return load_run(build(self.cfg, variant), self.cfg, f"{variant}/{seed}")

    def with_unet(self, unet: UNet2DConditionModel) -> StableDiffusion:
        return StableDiffusion(unet, self.sd.text_encoders, self.sd.tokenizers, self.sd.codec, self.sd.schedule)

    def plain(self, setting: str, sd: StableDiffusion, n: int | None = None) -> Images:
        """Without an image prompt; the first n, or all."""
        texts = self.texts[setting][:n]
        return sd.sample(texts, steps=self.cfg.ddim, guidance=self.cfg.guidance, noise=self.noise[: len(texts)])

    def prompted(self, setting: str, model: SimpleAdapter, sd: StableDiffusion | None = None, n: int | None = None) -> Images:
        """With it."""
        texts, fine = self.texts[setting][:n], model.image_proj.fine
        e = features(self.cfg.encoder, self.cfg.prompts, 2, fine)[self.rows[: len(texts)]].to(self.on)
        nothing = no_image(tower(self.cfg.encoder), fine).to(self.on)
        how = {"noise": self.noise[: len(texts)], "steps": self.cfg.ddim, "guidance": self.cfg.guidance}
        return sample(model, sd or self.sd, texts, e, nothing, **how)

    def base_draws(self) -> Draws:
        """What no seed changes: the base, the base of another style, which is trained once, and the image prompts themselves."""
        restyled = self.with_unet(self.load("restyled", self.cfg.seeds[0]).unet)
        found = {(setting, "none"): self.plain(setting, self.sd) for setting in ("alone", "told", "whole")}
        found |= {("mixed", "0.0"): self.plain("mixed", self.sd), ("told", "restyled"): self.plain("told", restyled)}
        return found | {("told", "prompt"): self.images[: self.cfg.prompts]}

    def seed_draws(self, seed: int) -> Draws:
        models = {variant: self.load(variant, seed) for variant in ("decoupled", "simple", "finetuned", "plus")}
        ours, restyled = models["decoupled"], self.with_unet(self.load("restyled", self.cfg.seeds[0]).unet)
        found = {("alone", arm): self.prompted("alone", model) for arm, model in models.items()}
        found |= {("told", arm): self.prompted("told", models[arm]) for arm in ("decoupled", "simple")}
        found |= {
            ("told", "decoupled, restyled"): self.prompted("told", ours, restyled),
            ("mixed", "simple"): self.prompted("mixed", models["simple"]),
        }
        for ours.scale in LAMBDAS:
            found["mixed", str(ours.scale)] = self.prompted("mixed", ours)
        return found | {("whole", "finetuned"): self.plain("whole", self.with_unet(models["finetuned"].unet))}

    def difference_at_zero(self, seed: int) -> float:
        ours = self.load("decoupled", seed)
        ours.scale = 0.0
        return (self.prompted("mixed", ours, n=EXACT) - self.plain("mixed", self.sd, n=EXACT)).abs().max().item()

    @torch.no_grad()
    def measure(self, setting: str, images: Images) -> dict[str, float]:
        """seen: accuracy of SEEN against the image prompt; text: of what the text says; similarity: cosine of the reader's embeddings of sample and
        prompt; diversity: perceptual distance of two draws; border: distance from the frame's colour; inside: as seen, the border left out."""
        found, n = read(self.reader, images), len(images)
        edge = torch.ones(images.shape[-2:], dtype=torch.bool, device=self.on)
        edge[WIDTH:-WIDTH, WIDTH:-WIDTH] = False
        inside = F.pad(images[..., WIDTH:-WIDTH, WIDTH:-WIDTH], [WIDTH] * 4, mode="replicate")
        measured = {
            "seen": right(found, self.shown[:n], SEEN),
            "text": right(found, self.asked[setting][:n], TOLD[setting]),
            "similarity": F.cosine_similarity(self.reader.embedding(images), self.reader.embedding(self.images[:n])).mean().item(),
            "border": (images[..., edge] - torch.tensor(FRAME, device=self.on)[:, None]).abs().mean().item(),
            "inside": right(read(self.reader, inside), self.shown[:n], SEEN),
        }
        if setting == "alone":
            draws = images.unflatten(0, (self.cfg.draws, -1))
            measured["diversity"] = fmean(lpips(self.reader, a, b).mean().item() for a, b in combinations(draws, 2))
        return measured

    def picture(self, draws: Draws) -> str:
        """The figure's samples: a row for each of the first prompts, a column for each of COLUMNS."""
        columns = torch.stack([column[: min(SHOWN, self.cfg.prompts)] for column in (self.images, *(draws[key] for key in COLUMNS))])
        tiles = rearrange(F.pad(columns, [1, 1, 1, 1], value=1.0), "column row c h w -> (row h) (column w) c")
        return as_png((255 * tiles).round().byte().cpu().numpy())


def right(found: Tensor, asked: Tensor, factors: Sequence[str]) -> float:
    """The share of right answers over some factors, all of which every scene has."""
    columns = [list(scenes.FACTORS).index(factor) for factor in factors]
    return (found[:, columns] == asked[:, columns]).double().mean().item()


# ---- the figure -------------------------------------------------------------------------------------------------------------------------

COLUMNS = {
    ("mixed", "0.0"): "text alone\n(λ = 0)", ("mixed", "0.25"): "λ = 0.25", ("mixed", "0.5"): "λ = 0.5", ("mixed", "0.75"): "λ = 0.75",
    ("mixed", "1.0"): "λ = 1", ("mixed", "simple"): "simple\nadapter", ("alone", "decoupled"): "image alone\nIP-Adapter", ("alone", "plus"): "plus",
    ("alone", "simple"): "simple\nadapter", ("alone", "finetuned"): "fine-tuned", ("told", "restyled"): "framed base\nalone",
    ("told", "decoupled, restyled"): "same adapter\non it",
}  # fmt: skip
ARMS = {"none": "no image", "simple": "simple adapter", "decoupled": "IP-Adapter", "plus": "plus", "finetuned": "fine-tuned U-Net"}


def figure(details: dict) -> Figure:
    """Samples; accuracy of what the image shows; image against text over λ."""
    fig = Figure(figsize=(13, 9.5), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1.35, 1))
    axis, table = top.subplots(), details["table"]
    axis.imshow(from_png(details["picture"]), interpolation="nearest")
    axis.set_xticks([34 * i + 17 for i in range(len(COLUMNS) + 1)], ["image\nprompt", *COLUMNS.values()], fontsize=8)
    axis.set_yticks(
        [34 * i + 17 for i in range(len(details["texts"]))], [text.replace(" at", "\nat").replace(" on", "\non") for text in details["texts"]]
    )
    axis.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8)
    axis.spines[:].set_visible(False)
    bars, curve = bottom.subplots(1, 2)
    for k, (setting, label) in enumerate({"alone": "image alone", "told": "with a text of shape and place"}.items()):
        for i, arm in enumerate(ARMS):
            runs = table[setting].get(arm, {}).get("seen", [])
            if runs:
                bars.bar(i + 0.4 * k - 0.2, fmean(runs), 0.38, color=f"C{k}", label=label if arm == "none" else None)
                bars.plot([i + 0.4 * k - 0.2] * len(runs), runs, "k.", markersize=4)
    bars.set_xticks(range(len(ARMS)), ARMS.values(), fontsize=8)
    bars.set(ylim=(0, 1), ylabel="accuracy", title="Colour, texture and background of the image prompt; a dot per seed")
    bars.legend(fontsize=8)
    mixed = {arm: [fmean(table["mixed"][arm][name]) for name in ("text", "similarity")] for arm in table["mixed"]}
    sweep = [mixed[str(scale)] for scale in (0.0, *LAMBDAS)]
    curve.plot(*zip(*sweep, strict=True), "o-", label="IP-Adapter")
    for scale, place in zip((0.0, *LAMBDAS), sweep, strict=True):
        curve.annotate(f"λ = {scale:g}", place, textcoords="offset points", xytext=(6, 4), fontsize=8)
    curve.plot(*mixed["simple"], "s", label="simple adapter")
    curve.set(xlabel="accuracy of the text's place and background", ylabel="similarity to the image prompt", title="A text that disagrees")
    curve.legend(fontsize=8)
    return fig


# ---- published adapters -----------------------------------------------------------------------------------------------------------------


def coco(root: Path) -> list[tuple[Path, str]]:
    """Images of val2017/ with the first caption of each, from annotations/captions_val2017.json. Raises UserError."""
    file = root / "annotations" / "captions_val2017.json"
    if not file.is_file():
        raise UserError(
            f"{file} is missing: --data takes a COCO directory with val2017/ and annotations/ (images and annotations of cocodataset.org)"
        )
    try:
        made = json.loads(file.read_text())
        captions = {row["image_id"]: row["caption"] for row in reversed(made["annotations"])}
        return [(root / "val2017" / row["file_name"], captions[row["id"]]) for row in made["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not COCO's list of captions ({error!r}): fetch it again") from None


@torch.no_grad()
def evaluate_published(cfg: Config) -> dict[str, float]:
    """CLIP-I: cosine of the judge's embeddings of sample and image prompt. CLIP-T: of sample and caption; times 2.5 it is CLIPScore. Empty text."""
    on, sd = gpu.device(cfg), base(cfg.base)
    adapter, encoder = load_adapter(sd.unet, cfg.weights).to(on), tower(cfg.encoder).to(on)
    judge, fine = CLIP.from_pretrained(cfg.judge, dtype=torch.float32).to(on), adapter.image_proj.fine
    pairs, sd, nothing = coco(Path(cfg.data)), sd.to(on), no_image(encoder, fine)
    takes, has = adapter.image_proj.features, nothing.shape[-1]
    if takes != has:
        raise UserError(f"the adapter reads features of width {takes}, --encoder {cfg.encoder} has {has}: give the tower it was trained with")
    prepare = clip_pixels(cfg.encoder, encoder.config.image_size)
    judged = clip_pixels(cfg.judge, judge.config.vision_config.image_size)
    similar = lambda a, b: F.cosine_similarity(a, b).mean().item()
    clip_i, clip_t = [], []
    for i, (path, caption) in enumerate(pairs[: cfg.prompts or None]):
        image = read_image(path).to(on)
        e = image_features(encoder, prepare(image)[None], fine).repeat(cfg.draws, *[1] * (nothing.ndim - 1))
        how = {"noise": sd.noise(cfg.draws, seed=i), "steps": cfg.ddim, "guidance": cfg.guidance}
        drawn = judge.image_features(judged(sample(adapter, sd, [""] * cfg.draws, e, nothing, **how)))
        clip_i.append(similar(drawn, judge.image_features(judged(image)[None])))
        clip_t.append(similar(drawn, judge.text_features(sd.tokenizers[0]([shortened(caption, sd)]).to(on))))
    return {"images": len(clip_i), "clip_i": fmean(clip_i), "clip_t": fmean(clip_t), "clip_score": 2.5 * fmean(max(c, 0) for c in clip_t)}
