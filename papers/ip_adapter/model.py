"""IP-Adapter: an image as a prompt for a frozen text-to-image model (Ye et al. 2023, arXiv 2308.06721).

    e = CLIP(image)                                               class embedding, projected, not normalised          b E
    c_i = LN(W_p e + b_p)                                         n = 4 image tokens, each with its rows of W_p       b n D
    Z_new = softmax(Q Kᵀ/√d) V + λ softmax(Q K'ᵀ/√d) V'   (5, 8)  in every cross-attention; λ = 1 in training         b h N d
            Q = Z W_q;  K, V = c_t W_k, c_t W_v                   frozen; the text c_t
            K', V' = c_i W'_k, c_i W'_v                           trained; at the start W' = W
    L = E |ε - ε_θ(x_t, c_t, c_i, t)|²                     (6)    of W_p, b_p, LN, W'_k, W'_v alone
    ε̂ = w ε_θ(x_t, c_t, c_i, t) + (1-w) ε_θ(x_t, t)        (7)    without prompts: the empty text, and c_i of e = 0

The sum is taken of all heads before the frozen W_o, which is applied once. In training 5% of the samples lose the image (e = 0), 5% the text
and 5% both.
"plus" makes 16 tokens of the tower's last but one hidden state with a resampler, "full" one token of each of its tokens.

Image tokens travel behind the text's as one context. Without a control the frozen W_k and W_v read them all: that is the simple adapter of the
paper's ablation. The control takes them off again and gives them an attention of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from common import diffusion
from common.attention import Attention, Site, attend, controlled, merge_heads, split_heads
from common.backbones.clip import CLIPVisionWithProjection
from common.backbones.sd_unet import TokenAttention, UNet2DConditionModel
from common.diffusion import guided
from common.errors import UserError
from common.loop import load_named, read_safetensors, read_torch
from common.stable_diffusion import StableDiffusion

Features = Float[Tensor, "b E"] | Float[Tensor, "b m E"]  # of an image, global or fine
Tokens = Float[Tensor, "b n D"]

# ---- image tokens -----------------------------------------------------------------------------------------------------------------------


def image_features(encoder: CLIPVisionWithProjection, pixels: Float[Tensor, "b 3 H W"], fine: bool) -> Features:
    """e; or, fine, all tokens of the last but one hidden state."""
    return encoder(pixels, state=-2) if fine else encoder.feature(pixels)


def no_image(encoder: CLIPVisionWithProjection, fine: bool) -> Features:
    """What stands for a dropped image: e = 0; or, fine, the features of pixels that are all zero."""
    c, like = encoder.config, encoder.visual_projection.weight
    if fine:
        return image_features(encoder, like.new_zeros(1, c.num_channels, c.image_size, c.image_size), fine)
    return like.new_zeros(1, c.projection_dim)


class ImageProjection(nn.Module):
    """c_i = LN(W_p e + b_p), with one norm for all n tokens. features: E; dim: D."""

    fine = False

    def __init__(self, features: int, dim: int, tokens: int = 4):
        super().__init__()
        self.features, self.tokens = features, tokens
        self.proj = nn.Linear(features, tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, e: Float[Tensor, "b E"]) -> Tokens:
        return self.norm(self.proj(e).unflatten(-1, (self.tokens, -1)))


class FullProjection(nn.Module):
    """Of the "full" adapters: a token for each of the tower's. The published ones read ViT-H's class and 16 x 16 patches."""

    fine = True

    def __init__(self, features: int, dim: int, tokens: int = 257):
        super().__init__()
        self.features, self.tokens = features, tokens
        self.proj = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, dim), nn.LayerNorm(dim))

    def forward(self, e: Float[Tensor, "b n E"]) -> Tokens:
        return self.proj(e)


class PerceiverAttention(Attention):
    """l ← W_o softmax(q kᵀ/√d) v,  q = W_q LN l,  [k, v] = W_kv [LN x, LN l]: learnt queries l read features x and themselves."""

    def __init__(self, dim: int, dim_head: int, heads: int, layer: int = 0):
        super().__init__(heads, "cross", layer)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Float[Tensor, "b m c"], latents: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(self.context(latents, torch.cat([x, latents], 1))).chunk(2, -1)
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(latents), k, v))
        return self.output(self.to_out(merge_heads(self.attend(q, k, v))))


class Resampler(nn.Module):
    """Of the "plus" adapters: l ← l + A(x, l), l ← l + W₂ gelu(W₁ LN l), `depth` times; c_i = LN(W_out l). x = W_in of the features.

    dim: of x and l; queries: n. Published: dim 768 for Stable Diffusion 1.5, 1280 for XL.
    """

    fine = True

    def __init__(self, features: int, dim_out: int, dim: int, *, depth: int = 4, heads: int = 12, dim_head: int = 64, queries: int = 16, ff: int = 4):
        super().__init__()
        self.features, self.tokens = features, queries
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)
        self.proj_in, self.proj_out = nn.Linear(features, dim), nn.Linear(dim, dim_out)
        self.norm_out = nn.LayerNorm(dim_out)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head, heads, layer), feed_forward(dim, ff * dim)]) for layer in range(depth)
        )

    def forward(self, e: Float[Tensor, "b m E"]) -> Tokens:
        x, latents = self.proj_in(e), self.latents.expand(len(e), -1, -1)
        for attention, mlp in self.layers:
            latents = attention.hidden(latents)
            latents = latents + attention(x, latents)
            latents = latents + mlp(latents)
        return self.norm_out(self.proj_out(latents))


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """W₂ gelu(W₁ LN l)."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False))


# ---- image prompts ----------------------------------------------------------------------------------------------------------------------


class SimpleAdapter(nn.Module):
    """The ablation's baseline: image tokens behind the text's, for the frozen W_k and W_v; only the projection learns."""

    def __init__(self, image_proj: nn.Module):
        super().__init__()
        self.image_proj = image_proj

    def prompt(self, text: Float[Tensor, "b m D"], e: Features) -> Float[Tensor, "b k D"]:
        """The U-Net's context."""
        return torch.cat([text, self.image_proj(e)], 1)

    @contextmanager
    def on(self, unet: UNet2DConditionModel) -> Iterator[UNet2DConditionModel]:
        """Inside, the U-Net that it yields understands `prompt`."""
        yield unet


class KeyValue(nn.Module):
    """W'_k and W'_v of one layer, at first its W_k and W_v."""

    def __init__(self, layer: TokenAttention):
        super().__init__()
        self.to_k_ip, self.to_v_ip = (deepcopy(w).requires_grad_() for w in (layer.to_k, layer.to_v))


class IPAdapter(SimpleAdapter):
    """Eqs. 5 and 8, as a control of a U-Net's cross-attentions. `scale` is λ. The state dict has the published names."""

    def __init__(self, image_proj: nn.Module, unet: nn.Module, scale: float = 1.0):
        super().__init__(image_proj)
        self.scale = scale
        layers = {name: unet.get_submodule(name) for name in published_order(unet)}
        self.index = {name: str(i) for i, name in enumerate(layers)}
        self.ip_adapter = nn.ModuleDict({self.index[name]: KeyValue(layer) for name, layer in layers.items() if layer.kind == "cross"})

    @contextmanager
    def on(self, unet: nn.Module) -> Iterator[nn.Module]:
        with controlled(unet, self, where=lambda site: site.kind == "cross"):
            yield unet

    def context(self, site: Site, x: Float[Tensor, "b N c"], ctx: Float[Tensor, "b m D"]) -> Float[Tensor, "b k D"]:
        """Take the image tokens off the text, for `heads` of the same layer."""
        n = self.image_proj.tokens
        self.image_tokens = ctx[:, -n:]
        return ctx[:, :-n]

    def heads(self, site: Site, o: Float[Tensor, "b h N d"], q: Float[Tensor, "b h N d"]) -> Float[Tensor, "b h N d"]:
        """Z_new."""
        layer = self.ip_adapter[self.index[site.name]]
        k, v = (split_heads(w(self.image_tokens), site.heads) for w in (layer.to_k_ip, layer.to_v_ip))
        return o + self.scale * attend(q, k, v)


def published_order(unet: nn.Module) -> list[str]:
    """The attention layers as the published files number them: the way down, the way up, then the middle; self before cross."""
    names = [name for name, layer in unet.named_modules() if isinstance(layer, Attention)]
    return sorted(names, key=lambda name: name.startswith("mid_block"))


class FineTuned(SimpleAdapter):
    """The baseline without text: a copy of the whole U-Net, tuned with image tokens in the text's place."""

    def __init__(self, image_proj: nn.Module, unet: UNet2DConditionModel):
        super().__init__(image_proj)
        self.unet = deepcopy(unet).requires_grad_()

    def prompt(self, text: Float[Tensor, "b m D"], e: Features) -> Tokens:
        """The image tokens alone."""
        return self.image_proj(e)

    @contextmanager
    def on(self, unet: UNet2DConditionModel) -> Iterator[UNet2DConditionModel]:
        """Its own, whatever is given."""
        yield self.unet


# ---- training and sampling --------------------------------------------------------------------------------------------------------------


def dropped(r: Float[Tensor, "b"], share: float = 0.05) -> tuple[Bool[Tensor, "b"], Bool[Tensor, "b"]]:
    """Which samples lose the image and which the text, for uniform r: a share the image, the next the text, the next both."""
    both = (r >= 2 * share) & (r < 3 * share)
    return (r < share) | both, ((r >= share) & (r < 2 * share)) | both


def shortened(text: str, sd: StableDiffusion) -> str:
    """As many of its words as the text towers take."""
    words = text.split()
    while any(len(tokenizer.tokens(" ".join(words))) > tokenizer.length - 2 for tokenizer in sd.tokenizers):
        words.pop()
    return " ".join(words)


def training_loss(
    model: SimpleAdapter, sd: StableDiffusion, z: Float[Tensor, "b l h w"], captions: list[str], e: Features, nothing: Features
) -> Tensor:
    """Eq. 6, with what the base was trained to predict in the place of ε. nothing: the features of no image."""
    lost_image, lost_text = dropped(torch.rand(len(z), device=z.device))
    condition = sd.condition(["" if lost else caption for caption, lost in zip(captions, lost_text.tolist(), strict=True)])
    e = torch.where(lost_image.reshape(-1, *[1] * (e.ndim - 1)), nothing, e)
    t = torch.randint(sd.schedule.num_train_timesteps, (len(z),), device=z.device)
    noise = torch.randn_like(z)
    with model.on(sd.unet) as unet:
        condition["encoder_hidden_states"] = model.prompt(condition["encoder_hidden_states"], e)
        predicted = unet(sd.schedule.add_noise(z, noise, t), t, **condition)
    return nn.functional.mse_loss(predicted, sd.schedule.target(z, noise, t))


@torch.no_grad()
def sample(
    model: SimpleAdapter,
    sd: StableDiffusion,
    prompts: list[str],
    e: Features,
    nothing: Features,
    *,
    noise: Float[Tensor, "b l h w"],
    steps: int = 50,
    guidance: float = 7.5,
) -> Float[Tensor, "b 3 H W"]:
    """Images in [0, 1] by DDIM with eq. 7."""
    condition, empty = sd.condition(prompts), sd.condition([""] * len(prompts))
    with model.on(sd.unet) as unet:
        for part, features in ((condition, e), (empty, nothing.expand_as(e))):
            part["encoder_hidden_states"] = model.prompt(part["encoder_hidden_states"], features)
        z = diffusion.sample(guided(unet, condition, empty, guidance), noise, sd.schedule, steps)
    return sd.decode(z).clamp(0, 1)


# ---- published files --------------------------------------------------------------------------------------------------------------------


def load_adapter(unet: UNet2DConditionModel, path: Path) -> IPAdapter:
    """The adapter of a published file, or of a run here. Raises UserError for another file and for one of another base."""
    state = read_adapter(Path(path))
    projection = projection_for({name.removeprefix("image_proj."): t for name, t in state.items() if name.startswith("image_proj.")}, path)
    return load_named(IPAdapter(projection, unet), state, path).eval()


def read_adapter(path: Path) -> dict[str, Tensor]:
    """Flat names: those of a safetensors file, or of a torch file of two dicts, image_proj and ip_adapter."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    parts = read_torch(path)
    try:
        return {f"{part}.{name}": tensor for part in ("image_proj", "ip_adapter") for name, tensor in parts[part].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a torch file of the two dicts image_proj and ip_adapter ({error}): give a published adapter") from None


def projection_for(state: dict[str, Tensor], path: Path) -> nn.Module:
    """The projection whose weights these are, with its sizes; heads of the resampler have 64 channels."""
    try:
        if "latents" in state:
            (_, queries, dim), inner, hidden = state["latents"].shape, len(state["layers.0.0.to_q.weight"]), len(state["layers.0.1.1.weight"])
            depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
            dim_out, features = len(state["proj_out.weight"]), state["proj_in.weight"].shape[1]
            return Resampler(features, dim_out, dim, depth=depth, heads=inner // 64, queries=queries, ff=hidden // dim)
        if "proj.0.weight" in state:
            return FullProjection(len(state["proj.0.weight"]), len(state["proj.2.weight"]))
        (rows, features), dim = state["proj.weight"].shape, len(state["norm.weight"])
        return ImageProjection(features, dim, rows // dim)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} has no image projection that is known here ({error}): give a global, plus or full IP-Adapter") from None
