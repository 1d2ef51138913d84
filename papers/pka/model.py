"""PKA: Position-aligned and Keyword-scoped Attention (Zhou et al. 2026, arXiv 2602.06850) for several conditions in one FLUX transformer.

Tokens: text T, noisy image X (N on a grid), spatial conditions SP_1 ... SP_c (N each, on the same grid), subjects SJ_1 ... SJ_s (N_s each).
The usual way, concatenate-and-attend, lets every image token read all of them: softmax(Q_X [K_T; K_X; K_SP; K_SJ]ᵀ / √d), O((T + N + cN + sN_s)²)
a layer. Here image and text read each other as before, a condition reads only itself, and of the conditions image token i reads

    PAA(X_i; SP) = softmax(Q_{X_i} K_{SP,i}ᵀ / √d) V_{SP,i}         SP,i: the c tokens at its own position; O(cN) in all
    M^t          = 1[Σ_keyword softmax(Q_X K_Tᵀ / √d) ≥ ε]          mean of the heads; used at step t + 1, at the first step M = 1
    KSA(X; SJ)   = softmax((Q_X ⊙ M) K_SJᵀ / √d) V_SJ               only rows with M_i = 1 are computed, the others are zero

How they join the attention over text and image:

    joint      O_X,i = softmax over T, X, SP,i and, where M_i = 1, SJ            one softmax for all that token i may read
    additive   O_X = Attention(Q_X, [T; X]) + g_paa PAA + g_ksa KSA              a gate for each layer and head, 0 at the start

In the joint softmax all conditions of token i act as one more key. With ℓ the logits' log-sum-exp over them and C_i their own softmax average,

    O_X,i = Σ_j w_ij V_j + w_i∅ C_i,    w_i = softmax([Q_{X_i} K_jᵀ / √d for j in T, X;  ℓ_i])

which the fused kernel computes: ℓ_i is one more channel of the query, and w_i∅ one more channel of the output.

A condition has timestep 0 and reads neither noise nor image, so its K and V are computed in the first step of a sampler and read in the others.
Training draws its times by conditional-sensitivity-aware sampling, CSAS, with 1 = noise: t = 1/(1 + e^-(μ + σ z)), z ~ N(0, 1), μ = 0.5, σ = 1.5.
"""

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from common.attention import attention_logits
from common.backbones.clip import CLIPText
from common.backbones.flux import (
    Branch,
    Cached,
    Conditioning,
    FluxAttention,
    FluxConfig,
    FluxTransformer2DModel,
    Heads,
    Mix,
    Visible,
    image_ids,
    pack,
    unpack,
)
from common.backbones.sd_vae import AutoencoderKL
from common.diffusion import flow_sample, flow_sigmas, guided
from common.errors import UserError
from common.loop import load_weights, read_safetensors
from common.lora import add_lora, load_lora, lora_state

NEVER = -1e4  # a logit whose weight is zero in every precision, and which times zero is zero

# what of FLUX an adapter changes, as in OminiControl; all but x_embedder are inside the blocks
TARGETS = r"x_embedder|.*\.(norm1?\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2|proj_mlp|proj_out)"
DENOISER = "denoiser"  # the adapter of text and image

Rows, Lse = Float[Tensor, "b h n d"], Float[Tensor, "b h n"]
Part = tuple[Rows, Lse]  # what each query reads somewhere: the average of the values, and the log-sum-exp of the logits

# ---- attention to conditions ------------------------------------------------------------------------------------------------------------


def combine(parts: Sequence[Part]) -> Part:
    """One softmax over what several parts read."""
    lse = torch.stack([lse for _, lse in parts])
    return sum(weight[..., None] * o for weight, (o, _) in zip(lse.softmax(0), parts, strict=True)), lse.logsumexp(0)


def paa(q: Rows, ks: Sequence[Rows], vs: Sequence[Rows]) -> Part:
    """PAA: a single key is a part of its own, so that nothing but the c logits of each token comes into being."""
    return combine([(v, (q * k).sum(-1) * q.shape[-1] ** -0.5) for k, v in zip(ks, vs, strict=True)])


def keyword_mask(
    q: Rows, k_text: Float[Tensor, "b h m d"], keyword: Bool[Tensor, "b m"], epsilon: float, relative: bool = False
) -> Bool[Tensor, "b n"]:
    """M: the image tokens that give the keyword's tokens at least ε of their attention to text; all where there is no keyword.

    relative: ε is a share of the range between the image tokens that give the keyword least and most.
    """
    share = (attention_logits(q, k_text).softmax(-1).mean(1) * keyword[:, None]).sum(-1)
    if relative:
        low, high = share.aminmax(dim=1, keepdim=True)
        share = (share - low) / (high - low).clamp(min=1e-9)
    return (share >= epsilon) | ~keyword.any(1, keepdim=True)


def ksa(q: Rows, k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], mask: Bool[Tensor, "b n"]) -> Part:
    """KSA: the rows with M = 1 are gathered, as many as the fullest sample has, and scattered into zeros."""
    rows = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    kept, rows = mask.gather(1, rows)[:, None], rows[:, None]
    logits = attention_logits(q.take_along_dim(rows[..., None], 2), k)
    o, lse = logits.softmax(-1) @ v, logits.logsumexp(-1)
    o, lse = o.masked_fill(~kept[..., None], 0), lse.masked_fill(~kept, NEVER)
    empty = q.new_full(q.shape[:3], NEVER)
    return torch.zeros_like(q).scatter(2, rows[..., None].expand_as(o), o), empty.scatter(2, rows.expand_as(lse), lse)


def attend_beside(attention: FluxAttention, q: Rows, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], lse: Lse) -> tuple[Rows, Tensor]:
    """Attention over m keys and one more, whose logit is lse and whose value is zero; and the weight w_∅ of that one, b h n 1.

    In bfloat16 the rounding of lse, like that of q and k, changes w_∅ by a few percent.
    """
    scale = q.shape[-1] ** -0.5
    k, v = (F.pad(t, (0, 1, 0, 1)) for t in (k, v))
    k[..., -1, -1], v[..., -1, -1] = 1 / scale, 1
    o = attention.attend(torch.cat([q, lse[..., None]], -1), k, v, scale=scale)
    return o[..., :-1], o[..., -1:]


# ---- the mix of FLUX's branches ---------------------------------------------------------------------------------------------------------


class PKA(nn.Module):
    """How branches read each other, in the joint form. The branch "text" is T, "image" is X; of the others those in `keywords` are
    subjects, the rest are spatial.

    keywords: for each subject the text tokens that name it, Bool[b m]; to be set before the model is called. A control meets all conditions
    of a token as the last key of the image's call, and one more channel in q, k, v and the heads' outputs.
    """

    def __init__(self, epsilon: float = 0.2, relative: bool = False):
        super().__init__()
        self.epsilon, self.relative = epsilon, relative  # see keyword_mask
        self.keywords: dict[str, Bool[Tensor, "b m"]] = {}
        self.masks: dict[tuple[int, str], Bool[Tensor, "b n"]] = {}  # M of the step before, by layer and subject

    def forward(self, attention: FluxAttention, branches: dict[str, Heads]) -> dict[str, Rows]:
        """The outputs of all branches that have queries; a `Mix`."""
        conditions = {name: heads for name, heads in branches.items() if name not in ("text", "image")}
        outputs = Visible()(attention, {name: heads for name, heads in conditions.items() if heads[0] is not None})
        text, image = branches["text"], branches["image"]
        if not conditions:
            return Visible()(attention, branches)
        spatial = [heads for name, heads in conditions.items() if name not in self.keywords]
        aligned = self.aligned(image[0], [k for _, k, _ in spatial], [v for _, _, v in spatial]) if spatial else None
        scoped = [
            ksa(image[0], k, v, self.scope(attention, name, image[0], text[1])) for name, (_, k, v) in conditions.items() if name in self.keywords
        ]
        q, k, v = (torch.cat(pair, 2) for pair in zip(text, image, strict=True))
        o = self.join(attention, q, k, v, aligned, scoped)
        return outputs | dict(zip(("text", "image"), o.split([text[0].shape[2], image[0].shape[2]], 2), strict=True))

    def aligned(self, q: Rows, ks: list[Rows], vs: list[Rows]) -> Part:
        """What image tokens read of the spatial conditions."""
        return paa(q, ks, vs)

    @torch.no_grad()
    def scope(self, attention: FluxAttention, subject: str, q: Rows, k_text: Float[Tensor, "b h m d"]) -> Bool[Tensor, "b n"]:
        """M for this call: in a sampler that of the step before, in training that of the call itself. An empty one is not used."""
        now, place = keyword_mask(q, k_text, self.keywords[subject], self.epsilon, self.relative), (attention.layer, subject)
        before = self.masks[place] if attention.step else torch.ones_like(now)
        now = torch.where(now.any(1, keepdim=True), now, before)
        if attention.step is None:
            return now
        self.masks[place] = now
        return before

    def join(self, attention: FluxAttention, q: Rows, k: Rows, v: Rows, aligned: Part | None, scoped: list[Part]) -> Rows:
        """O of text and image, whose tokens follow the text's."""
        c, lse = combine([aligned, *scoped] if aligned else scoped)
        text = q.shape[2] - c.shape[2]
        o, weight = attend_beside(attention, q, k, v, F.pad(lse, (text, 0), value=NEVER))
        return torch.cat([o[:, :, :text], o[:, :, text:] + weight[:, :, text:] * c], 2)


class AdditivePKA(PKA):
    """The additive form: separate softmaxes, and learnt gates for `layers` layers of `heads` heads."""

    def __init__(self, layers: int, heads: int, epsilon: float = 0.2, relative: bool = False):
        super().__init__(epsilon, relative)
        gate = lambda: nn.Parameter(torch.zeros(heads))
        self.gates = nn.ModuleList(nn.ParameterDict({"paa": gate(), "ksa": gate()}) for _ in range(layers))

    def join(self, attention: FluxAttention, q: Rows, k: Rows, v: Rows, aligned: Part | None, scoped: list[Part]) -> Rows:
        """Attention(Q, [T; X]) + g_paa PAA + g_ksa KSA."""
        gates = self.gates[attention.layer]
        o = attention.attend(q, k, v)
        for name, parts in {"paa": [aligned] if aligned else [], "ksa": scoped}.items():
            for part, _ in parts:
                o = o + gates[name][:, None, None] * F.pad(part, (0, 0, q.shape[2] - part.shape[2], 0))
        return o


class WindowPKA(PKA):
    """An image token reads the spatial conditions at a window of positions around its own; those outside of the image have no weight."""

    def __init__(self, grid: tuple[int, int], window: int = 3, epsilon: float = 0.2, relative: bool = False):
        super().__init__(epsilon, relative)
        (rows, columns), half = grid, window // 2
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        self.neighbours = []  # for each offset the tokens that have a neighbour there, and which
        for dy, dx in product(range(-half, half + 1), repeat=2):
            inside = (y + dy >= 0) & (y + dy < rows) & (x + dx >= 0) & (x + dx < columns)
            self.neighbours.append(((y * columns + x)[inside], ((y + dy) * columns + x + dx)[inside]))

    def aligned(self, q: Rows, ks: list[Rows], vs: list[Rows]) -> Part:
        """`paa` over the tokens of the window."""
        parts = []
        for here, there in ((here.to(q.device), there.to(q.device)) for here, there in self.neighbours):
            o, lse = paa(q[:, :, here], [k[:, :, there] for k in ks], [v[:, :, there] for v in vs])
            parts.append((torch.zeros_like(q).index_copy(2, here, o), q.new_full(q.shape[:3], NEVER).index_copy(2, here, lse)))
        return combine(parts)


def mix_of(arm: str, config: FluxConfig, grid: tuple[int, int], epsilon: float = 0.2, relative: bool = False) -> Mix:
    """How branches read each other: concatenate-and-attend or one of PKA's forms, on a grid of image tokens. Raises UserError."""
    mixes = {
        "concat": Visible,
        "joint": lambda: PKA(epsilon, relative),
        "additive": lambda: AdditivePKA(config.num_layers + config.num_single_layers, config.num_attention_heads, epsilon, relative),
        "window": lambda: WindowPKA(grid, epsilon=epsilon, relative=relative),
    }
    if arm not in mixes:
        raise UserError(f"--variant {arm}: take one of {', '.join(mixes)}")
    return mixes[arm]()


# ---- the model --------------------------------------------------------------------------------------------------------------------------


class ConditionedFlux(nn.Module):
    """FLUX with a branch and an adapter for each condition, and an adapter for text and image; FLUX itself is frozen.

    conditions: their names. subjects: those of them that show a subject. mix: a `PKA`, or `Visible()` for concatenate-and-attend. rank: of
    the adapters; 0 for none.
    """

    def __init__(self, flux: FluxTransformer2DModel, conditions: Sequence[str], subjects: Sequence[str], mix: Mix, rank: int):
        super().__init__()
        self.flux, self.conditions, self.subjects = flux.requires_grad_(False), tuple(conditions), tuple(subjects)
        self.pka = mix  # its gates are trained
        self.cache: dict[int, dict[str, Heads]] = {}
        for name in (*conditions, DENOISER) if rank else ():
            add_lora(flux, name, TARGETS, rank)
        for name, part in product(conditions, ("attn.to_q", "proj_mlp", "proj_out")):  # nobody reads what the last block makes of conditions
            layer = flux.single_transformer_blocks[-1].get_submodule(part)
            for matrix in (layer.lora_A, layer.lora_B):
                matrix[name].requires_grad_(False)

    def forward(
        self,
        z: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        states: Float[Tensor, "b m joint"],
        pooled: Float[Tensor, "b p"],
        keywords: Bool[Tensor, "b s m"] | None = None,
        guidance: Float[Tensor, "b"] | None = None,
        **images: Float[Tensor, "b c _ _"],
    ) -> Float[Tensor, "b c h w"]:
        """The velocity of latents z at times t under a text, and the latents of any of the conditions. keywords: a row for each subject.

        Inside a sampler the conditions are computed at step 0 and kept for the others.
        """
        if unknown := images.keys() - set(self.conditions):
            raise ValueError(f"no adapter for {', '.join(sorted(unknown))}: this model has {', '.join(self.conditions)}")
        if wrong := [name for name, image in images.items() if name not in self.subjects and image.shape != z.shape]:
            raise ValueError(f"{wrong[0]} is {tuple(images[wrong[0]].shape)}: a spatial condition has the size of the image, {tuple(z.shape)}")
        patch = math.isqrt(self.flux.config.in_channels // z.shape[1])
        grid, noisy = (z.shape[2] // patch, z.shape[3] // patch), Conditioning(t, pooled, guidance)
        clean = Conditioning(torch.zeros_like(t), pooled, guidance)
        main = [
            Branch("text", states, torch.zeros(states.shape[1], 3, device=z.device), noisy, DENOISER),
            Branch("image", pack(z, patch), image_ids(grid, device=z.device), noisy, DENOISER),
        ]
        shown = [Branch(name, pack(image, patch), self.ids(name, image, patch), clean, name) for name, image in images.items()]
        if isinstance(self.pka, PKA):
            self.pka.keywords = {name: keywords[:, i] for i, name in enumerate(self.subjects) if name in images}
        if self.step is None:
            return unpack(self.flux.velocity(main + shown, self.pka), grid, patch)
        if self.step == 0:
            self.cache = self.flux.condition_cache(shown) if shown else {}
        return unpack(self.flux.velocity(main, Cached(self.cache, self.pka) if shown else self.pka), grid, patch)

    def ids(self, name: str, image: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "n 3"]:
        """A spatial condition stands where the image does; a subject to the left of it, by its own width."""
        rows, columns = image.shape[2] // patch, image.shape[3] // patch
        left = torch.tensor([0, 0, columns if name in self.subjects else 0], device=image.device)
        return image_ids((rows, columns), device=image.device) - left

    @property
    def step(self) -> int | None:
        """The sampler's running step, None in training."""
        return self.flux.single_transformer_blocks[-1].attn.step


def pixels(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Bytes to -1 ... 1, which are the small Flux's latents."""
    return images / 127.5 - 1


def csas(n: int, mu: float = 0.5, sigma: float = 1.5, *, device=None) -> Float[Tensor, "n"]:
    """Times of n training examples: t = 1/(1 + e^-(μ + σ z)). Standard: μ = 0, σ = 1."""
    return torch.sigmoid(mu + sigma * torch.randn(n, device=device))


def flow_loss(model: ConditionedFlux, z: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], **told: Tensor) -> Tensor:
    """Mean |v - (ε - z)|² at z_t = (1-t) z + t ε."""
    noise, level = torch.randn_like(z), t.to(z.dtype)[:, None, None, None]
    return F.mse_loss(model((1 - level) * z + level * noise, t, **told), noise - z)


@torch.no_grad()
def sample(
    model: ConditionedFlux,
    noise: Float[Tensor, "b c h w"],
    told: dict[str, Tensor],
    null: dict[str, Tensor] | None = None,
    *,
    steps: int = 12,
    scale: float = 1.0,
    shift: float = 1.0,
    after=None,
) -> Float[Tensor, "b c h w"]:
    """Latents by Euler steps. told: the keyword arguments of the model. null: those that guidance leads away from; they keep the conditions."""
    sigmas = flow_sigmas(steps, shift)
    return flow_sample(guided(model, told, null and told | null, scale), noise, sigmas, timesteps=sigmas, after=after)


# ---- FLUX.1 and published adapters ------------------------------------------------------------------------------------------------------


class Encoders:
    """FLUX.1's frozen text encoders and autoencoder, of a published directory or hub id. Raises UserError."""

    def __init__(self, source: str, on: torch.device, dtype: torch.dtype = torch.bfloat16):
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError:
            raise UserError("FLUX.1's T5 needs transformers: `pip install attention-atlas[reference]`") from None
        self.on, self.vae = on, AutoencoderKL.from_pretrained(f"{source}/vae", dtype=dtype).to(on)
        self.clip = CLIPText.from_pretrained(f"{source}/text_encoder", dtype=dtype).to(on)
        self.t5 = T5EncoderModel.from_pretrained(source, subfolder="text_encoder_2", dtype=dtype).to(on).eval()
        self.tokenizers = [AutoTokenizer.from_pretrained(source, subfolder=name) for name in ("tokenizer", "tokenizer_2")]

    @torch.no_grad()
    def text(self, captions: list[str], items: list[str], length: int = 512) -> dict[str, Tensor]:
        """states, pooled and keywords of the model; the keyword is the item's last word, where the caption has it."""
        whole = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        short = self.tokenizers[0](captions, max_length=self.clip.config.max_position_embeddings, **whole)
        long = self.tokenizers[1](captions, max_length=length, return_offsets_mapping=True, **whole)
        words = [item.lower().split()[-1] for item in items]
        at = torch.tensor([caption.lower().find(word) for caption, word in zip(captions, words, strict=True)])[:, None]
        start, end = long["offset_mapping"].unbind(-1)
        keywords = (at >= 0) & (start < at + torch.tensor([len(word) for word in words])[:, None]) & (end > at) & (end > start)
        states, pooled = self.t5(long["input_ids"].to(self.on))[0], self.clip.text_model.pooled(short["input_ids"].to(self.on))
        return {"states": states, "pooled": pooled, "keywords": keywords[:, None].to(self.on)}

    @torch.no_grad()
    def latents(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b 16 h w"]:
        """z of images."""
        return self.vae.encode(pixels(images).to(self.vae.encoder.conv_in.weight))

    @torch.no_grad()
    def pixels(self, z: Float[Tensor, "b 16 h w"]) -> UInt8[Tensor, "b 3 H W"]:
        """Images of z."""
        return ((self.vae.decode(z).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_adapters(model: ConditionedFlux, directory: Path) -> None:
    """DIR/<condition>.safetensors and denoiser.safetensors under peft's names, as OminiControl's files have them; the additive form's gates."""
    for name in (*model.conditions, DENOISER):
        save_file({f"transformer.{path}": t.contiguous() for path, t in lora_state(model.flux, name).items()}, directory / f"{name}.safetensors")
    if isinstance(model.pka, AdditivePKA):
        save_file(model.pka.state_dict(), directory / "gates.safetensors")


def load_adapters(flux: FluxTransformer2DModel, directory: Path, conditions: Sequence[str], subjects: Sequence[str], mix: Mix) -> ConditionedFlux:
    """`flux` with the adapters that `save_adapters` wrote, or OminiControl, which leaves text and image without one. Raises UserError."""
    model = ConditionedFlux(flux, (), subjects, mix, rank=0)
    files = {name: Path(directory) / f"{name}.safetensors" for name in (*conditions, DENOISER)}
    for name, path in files.items():
        if path.is_file():
            load_lora(flux, name, read_safetensors(path)[0])
        elif name != DENOISER:
            raise UserError(f"{path} is missing: --weights is a directory with an adapter {name}.safetensors for the condition {name!r}")
    if isinstance(mix, AdditivePKA):
        load_weights(mix, Path(directory) / "gates.safetensors")
    model.conditions = tuple(conditions)
    return model.eval()
