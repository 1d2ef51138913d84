"""FILIP: Fine-grained Interactive Language-Image Pre-Training (Yao et al., ICLR 2022, arXiv 2111.07783).

CLIP's two towers, but every patch and every word keeps a feature of its own, and an image and a text are compared by who finds whom:

    f_i = normalise(W_I LN h)                                                  the n1 patches of image i           n1 d
    g_j = normalise(W_T LN h)                                                  the n2 words of text j, unpadded    n2 d

    max_r [f_i]_k · [g_j]_r                                                    what patch k finds in text j        (3)
    s^I_ij = 1/n1 Σ_k [f_i]_k · [g_j]_m,  m = argmax_r [f_i]_k · [g_j]_r       image to text                       (4)
    s^T_ij = 1/n2 Σ_k [f_i]_m · [g_j]_k,  m = argmax_r [f_i]_r · [g_j]_k       text to image                       (5)

    L^I = -1/b Σ_k log softmax_j(s^I_kj / τ)_k                                 over the texts of the batch         (1)
    L^T = -1/b Σ_k log softmax_j(s^T_jk / τ)_k                                 over its images
    L   = (L^I + L^T) / 2

To save time, a worker keeps only the tokens that found most in its own batch, before the workers exchange their tokens:

    the ⌈ρ n1⌉ tokens k of image i with the largest max_{j,r} [f_i]_k · [g_j]_r, and of the texts likewise

A class with C prompts scores 1/C Σ_c s^I(image, prompt c): token features of different prompts have no mean. CLIP is n1 = n2 = 1.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from common import gpu
from common.backbones.clip import CLIP, CLIPConfig, from_open_clip, open_clip_config
from common.errors import UserError
from common.loop import load_named, read_safetensors, read_torch

BLOCK = 2**24  # products in memory at a time

Images, Texts, Mask = Float[Tensor, "i n1 d"], Float[Tensor, "t n2 d"], Bool[Tensor, "t n2"]
Scores = Float[Tensor, "i t"]

# ---- late interaction -------------------------------------------------------------------------------------------------------------------


def unit_tokens(head: nn.Linear, h: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
    """normalise(W h): every token has length 1, so that products are cosines."""
    return F.normalize(head(h), dim=-1)


def products(image: Images, text: Texts, mask: Mask) -> Float[Tensor, "t n2 i n1"]:
    """[f_i]_k · [g_j]_r of every patch with every word; -inf where the word is padding."""
    flat = text.flatten(0, 1) @ image.flatten(0, 1).T
    return flat.view(*text.shape[:2], *image.shape[:2]).masked_fill(~mask[:, :, None, None], -torch.inf)


def similarities(image: Images, text: Texts, mask: Mask) -> tuple[Scores, Scores]:
    """(4) and (5): s^I and s^T of every image with every text. mask: True where a token is no padding, at least once in every text.

    Only BLOCK products are in memory at a time, and the gradient keeps none of them: it needs where the maxima were.
    """
    text, mask = text[:, mask.any(0)], mask[:, mask.any(0)]
    s_image, s_text = [], []
    for part in image.split(max(1, BLOCK // (image.shape[1] * mask.numel()))):
        s = products(part, text, mask)
        wide = torch.promote_types(s.dtype, torch.float32)  # only the products are in half precision
        by_patch, by_word = s.max(1).values.to(wide), s.max(3).values.to(wide)  # (3), and the same for words:  t i n1,  t n2 i
        s_image.append(by_patch.mean(2).T)  # (4)
        s_text.append(by_word.masked_fill(~mask[:, :, None], 0).sum(1).T / mask.sum(1))  # (5)
    return torch.cat(s_image), torch.cat(s_text)


def matches(image: Images, text: Texts, mask: Mask) -> Int[Tensor, "i n1"]:
    """The m of (4) for pairs (image i, text i): the word that each patch finds."""
    return torch.einsum("bkd,brd->bkr", image, text).masked_fill(~mask[:, None], -torch.inf).argmax(2)


def contrastive_loss(s_image: Float[Tensor, "b t"], s_text: Float[Tensor, "i b"], scale: Tensor, first: int = 0) -> Tensor:
    """L of (1), where scale is 1/τ. Row k of s^I and column k of s^T belong to image and text first + k."""
    own = first + torch.arange(len(s_image), device=s_image.device)
    return (F.cross_entropy(scale * s_image, own) + F.cross_entropy(scale * s_text.T, own)) / 2


# ---- fewer tokens -----------------------------------------------------------------------------------------------------------------------


Places = tuple[Int[Tensor, "i m1"], Int[Tensor, "t m2"], Bool[Tensor, "t m2"]]


@torch.no_grad()
def keep_best(image: Images, text: Texts, mask: Mask, ratio: float) -> Places:
    """The paper's selection: the share `ratio` of the tokens of each image and each text, rounded up, that find most in the whole batch.

    Returns the places of patches and words, and which of the words are no padding: short texts keep fewer.
    """
    by_patch, by_word = [], torch.full(mask.shape, -torch.inf, dtype=text.dtype, device=text.device)
    for part in image.split(max(1, BLOCK // (image.shape[1] * mask.numel()))):
        s = products(part, text, mask)
        by_patch.append(s.amax((0, 1)))
        by_word = torch.maximum(by_word, s.amax((2, 3)).to(text.dtype))
    patches = torch.cat(by_patch).topk(math.ceil(ratio * image.shape[1])).indices
    words = by_word.topk(math.ceil(ratio * text.shape[1])).indices
    return patches, words, torch.arange(words.shape[1], device=mask.device) < torch.ceil(ratio * mask.sum(1, keepdim=True))


@torch.no_grad()
def keep_paired(image: Images, text: Texts, mask: Mask, count: int) -> Places:
    """DeCLIP's selection: the `count` tokens with the largest sum of products with the tokens of their own pair."""
    s = torch.einsum("bkd,brd->bkr", image, text).masked_fill(~mask[:, None], 0)
    patches, words = s.sum(2).topk(count).indices, s.sum(1).masked_fill(~mask, -torch.inf).topk(count).indices
    return patches, words, mask.take_along_dim(words, 1)


def take(tokens: Float[Tensor, "b n d"], places: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The tokens at these places."""
    return tokens.take_along_dim(places[..., None], 1)


def gathered(x: Float[Tensor, "b *rest"]) -> Float[Tensor, "all_b *rest"]:
    """x of all workers, the first worker's first; gradients flow back to where they belong."""
    return x if gpu.world_size() == 1 else torch.cat(all_gather(x.contiguous()))


# ---- the model --------------------------------------------------------------------------------------------------------------------------


class FILIP(CLIP):
    """CLIP with its projections on every token, and their late interaction. It has CLIP's parameters under CLIP's names.

    ratio: ρ, the share of tokens kept in training. bias: of the projections; the paper's have none.
    """

    def __init__(self, config: CLIPConfig, ratio: float = 1.0, bias: bool = False):
        super().__init__(config)
        self.ratio = ratio
        if bias:
            self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
            self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)

    def image_tokens(self, pixel_values: Float[Tensor, "i c H W"]) -> Images:
        """f: the patches; the class token is left out."""
        h = self.vision_model.post_layernorm(self.vision_model(pixel_values)[:, 1:])
        return unit_tokens(self.visual_projection, h)

    def text_tokens(self, input_ids: Int[Tensor, "t n2"]) -> tuple[Texts, Mask]:
        """g, and True up to the end of text, which has the highest id."""
        mask = torch.arange(input_ids.shape[1], device=input_ids.device) <= input_ids.argmax(1, keepdim=True)
        return unit_tokens(self.text_projection, self.text_model.last(input_ids)), mask

    @property
    def scale(self) -> Tensor:
        """1/τ, at most 100 as in CLIP."""
        return self.logit_scale.exp().clamp(max=100)

    def forward(self, pixel_values: Float[Tensor, "i c H W"], input_ids: Int[Tensor, "t n2"]) -> tuple[Scores, Scores]:
        """s^I and s^T of every image with every text, from all tokens."""
        return self.compare(self.image_tokens(pixel_values), *self.text_tokens(input_ids))

    def compare(self, image: Images, text: Texts, mask: Mask) -> tuple[Scores, Scores]:
        """(4) and (5): features may have been computed long before."""
        return similarities(image, text, mask)

    def class_scores(self, image: Images, text: Texts, mask: Mask, classes: int) -> Float[Tensor, "i classes"]:
        """1/C Σ_c s^I(image, prompt c) of the C prompts of each class, which lie together in `text`."""
        return self.compare(image, text, mask)[0].unflatten(1, (classes, -1)).mean(2)

    def across_workers(self, image: Images, text: Texts, mask: Mask) -> tuple[Float[Tensor, "b all"], Float[Tensor, "all b"]]:
        """s^I of this worker's images with all texts, and s^T of all images with this worker's texts."""
        if self.ratio < 1:
            patches, words, mask = keep_best(image, text, mask, self.ratio)
            image, text = take(image, patches), take(text, words)
        if gpu.world_size() == 1:
            return self.compare(image, text, mask)
        return self.compare(image, gathered(text), gathered(mask))[0], self.compare(gathered(image), text, mask)[1]

    def loss(self, pixel_values: Float[Tensor, "b c H W"], input_ids: Int[Tensor, "b n2"]) -> Tensor:
        """L of pairs (image k, text k); in bfloat16 the tokens travel and are multiplied as such."""
        image, (text, mask) = self.image_tokens(pixel_values), self.text_tokens(input_ids)
        if torch.is_autocast_enabled(image.device.type):
            image, text = (tokens.to(torch.get_autocast_dtype(image.device.type)) for tokens in (image, text))
        s_image, s_text = self.across_workers(image, text, mask)
        return contrastive_loss(s_image, s_text, self.scale, gpu.rank() * len(image))


# ---- what it is compared with -----------------------------------------------------------------------------------------------------------


class GlobalCLIP(FILIP):
    """CLIP: the class token is the only patch and the end of text the only word, so that s^I = s^T = their cosine."""

    def image_tokens(self, pixel_values: Float[Tensor, "i c H W"]) -> Images:
        """n1 = 1."""
        return F.normalize(self.image_features(pixel_values), dim=-1)[:, None]

    def text_tokens(self, input_ids: Int[Tensor, "t n2"]) -> tuple[Texts, Mask]:
        """n2 = 1."""
        text = F.normalize(self.text_features(input_ids), dim=-1)[:, None]
        return text, torch.ones_like(text[..., 0], dtype=torch.bool)


class UnmaskedFILIP(FILIP):
    """Padding counts as words."""

    def text_tokens(self, input_ids: Int[Tensor, "t n2"]) -> tuple[Texts, Mask]:
        """Everything is True."""
        text, mask = super().text_tokens(input_ids)
        return text, torch.ones_like(mask)


class SummedFILIP(FILIP):
    """Sums over tokens as ColBERT has them, instead of means."""

    def compare(self, image: Images, text: Texts, mask: Mask) -> tuple[Scores, Scores]:
        """n1 s^I and n2 s^T."""
        s_image, s_text = super().compare(image, text, mask)
        return image.shape[1] * s_image, mask.sum(1) * s_text


class PairedFILIP(FILIP):
    """DeCLIP's re-implementation: tokens are chosen by `keep_paired`, and only those of the other workers' side are reduced."""

    def __init__(self, config: CLIPConfig, count: int, bias: bool = True):
        super().__init__(config, bias=bias)
        self.count = count

    def across_workers(self, image: Images, text: Texts, mask: Mask) -> tuple[Float[Tensor, "b all"], Float[Tensor, "all b"]]:
        """As FILIP's; all own tokens against the kept ones of the others."""
        patches, words, kept = keep_paired(image, text, mask, self.count)
        s_image = self.compare(image, gathered(take(text, words)), gathered(kept))[0]
        return s_image, self.compare(gathered(take(image, patches)), text, mask)[1]


# ---- published weights ------------------------------------------------------------------------------------------------------------------


def towers(arch: str) -> CLIPConfig:
    """The configuration of open_clip's model of this name. Raises UserError."""
    import open_clip

    config = open_clip.get_model_config(arch)
    if config is None or not isinstance(config.get("vision_cfg", {}).get("layers"), int) or "hf_model_name" in config["text_cfg"]:
        raise UserError(f"--arch {arch}: open_clip has no pair of plain towers of this name; take ViT-B-32 or ViT-L-14")
    return open_clip_config(config)


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip, of DeCLIP's FILIP, or of this project, under the names of FILIP."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "visual_projection.weight" in state:
        return state
    if "image_mapping.weight" not in state:
        return from_open_clip(state)
    dropped = ("visual.proj", "encode_text.text_projection", "image_mapping", "text_mapping", "logit_scale")
    rest = {name.removeprefix("encode_text."): tensor for name, tensor in state.items() if not name.startswith(dropped)}
    heads = {f"{ours}_projection.{leaf}": state[f"{theirs}_mapping.{leaf}"] for ours, theirs in HEADS.items() for leaf in ("weight", "bias")}
    return from_open_clip(rest) | heads | {"logit_scale": state["logit_scale_dense"]}


HEADS = {"visual": "image", "text": "text"}  # ours -> DeCLIP's


def load_published(config: CLIPConfig, path: Path, kind: type[FILIP] = FILIP) -> FILIP:
    """The model of a file that open_clip, DeCLIP or this project saved, as wide as the file's projections. Raises UserError."""
    try:
        state = from_published(_read(Path(path)))
        config.projection_dim = len(state["visual_projection.weight"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} holds no two towers of CLIP ({error}): give a file of open_clip or of DeCLIP's FILIP") from None
    return load_named(kind(config, bias="visual_projection.bias" in state), state, path).eval()


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    state = read_torch(path)
    try:
        return dict(next((state[key] for key in ("model", "state_dict") if key in state), state))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a torch checkpoint of plain tensors ({error}): fetch it again") from None
