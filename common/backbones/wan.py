"""Wan2.1 (Wan Team 2025): a video diffusion transformer, with the parameter names of diffusers' WanTransformer3DModel.

    h = Conv3d(video)                                        one token per patch, time-major                      b n D
    e = time(t),   [β, α, γ, β', α', γ'] = T_block + W silu(e)                                                    b 1 D each
    h ← h + γ A₁(LN(h) (1 + α) + β)                          self-attention over all frames, q and k rotated
    h ← h + A₂(LN(h), c)                                     cross-attention to the prompt, no gate
    h ← h + γ' W₂ gelu(W₁ (LN(h) (1 + α') + β'))
    v = W (LN(h) (1 + α) + β),   [β, α] = T_head + e         velocity, folded back into a video

    A(x, c) = W_o softmax(q kᵀ/√d) v,   q = norm W_q x,  k = norm W_k c,  v = W_v c      norm: RMS over all heads together

Image-to-video models read CLIP tokens i of the first frame too, with their own keys and values and the same queries:
A₂ = W_o (softmax(q k_cᵀ/√d) v_c + softmax(q k_iᵀ/√d) v_i).
"""

import math
import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Complex, Float, Real
from torch import Tensor, nn

from common.attention import Attention, merge_heads, split_heads
from common.backbones import flux
from common.backbones.flux import Embedder, FeedForward, modulate, wide
from common.backbones.pretrained import Pretrained
from common.layers import rotate_pairs, time_waves


@dataclass
class WanConfig:
    """The fields of the published config.json; the defaults are Wan2.1-T2V-1.3B's."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    eps: float = 1e-6
    image_dim: int | None = None  # 1280 for image-to-video
    added_kv_proj_dim: int | None = None  # the model's width for image-to-video


def rotary_table(grid: tuple[int, int, int], head_dim: int, *, device=None) -> Complex[Tensor, "n d"]:
    """e^(i · position · f) for the planes of a head, which time, rows and columns share as (d - 4⌊d/6⌋, 2⌊d/6⌋, 2⌊d/6⌋) channels."""
    ids = torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid))
    space = 2 * (head_dim // 6)
    return flux.rotary_table(ids, (head_dim - 2 * space, space, space))


# ---- layers --------------------------------------------------------------------------------------------------------------------------


class WanAttention(Attention):
    """A₁, or with a context A₂. What the image tokens add to A₂ is a site of its own, `<this>.image`, with the stages context to heads.

    A site's grid is the (rows, columns) of one frame; the n queries are n / (rows · columns) frames.
    """

    def __init__(self, dim: int, heads: int, kind: str, layer: int, eps: float, image_dim: int | None = None):
        super().__init__(heads, kind, layer)
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        if image_dim is not None:
            self.add_k_proj, self.add_v_proj = nn.Linear(image_dim, dim), nn.Linear(image_dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)
            self.image = Attention(heads, kind, layer)

    def forward(
        self,
        x: Float[Tensor, "b n D"],
        text: Float[Tensor, "b m D"] | None = None,
        image: Float[Tensor, "b i D"] | None = None,
        *,
        rotary: Complex[Tensor, "n d"] | None = None,
    ) -> Float[Tensor, "b n D"]:
        context = self.context(x, x if text is None else text)
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        if rotary is not None:
            q, k = rotate_pairs(q, rotary), rotate_pairs(k, rotary)
        o = self.attend(q, k, v)
        if image is not None:
            o = o + self.attend_image(x, q, image)
        return self.output(self.to_out(merge_heads(o)))

    def attend_image(self, x: Float[Tensor, "b n D"], q: Float[Tensor, "b h n d"], image: Float[Tensor, "b i D"]) -> Float[Tensor, "b h n d"]:
        image = self.image.context(x, image)
        k, v = self.norm_added_k(self.add_k_proj(image)), self.add_v_proj(image)
        return self.image.attend(q, split_heads(k, self.heads), split_heads(v, self.heads))


class WanTransformerBlock(nn.Module):
    """Self-attention, cross-attention, MLP. T_block is `scale_shift_table`; the modulation is computed in float32 at least."""

    def __init__(self, c: WanConfig, dim: int, layer: int):
        super().__init__()
        self.eps = c.eps
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.attn1 = WanAttention(dim, c.num_attention_heads, "self", layer, c.eps)
        self.attn2 = WanAttention(dim, c.num_attention_heads, "cross", layer, c.eps, c.added_kv_proj_dim)
        self.norm2 = nn.LayerNorm(dim, eps=c.eps) if c.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, c.ffn_dim)

    def forward(
        self,
        h: Float[Tensor, "b n D"],
        e: Float[Tensor, "b 6 D"],
        text: Float[Tensor, "b m D"],
        image: Float[Tensor, "b i D"] | None,
        rotary: Complex[Tensor, "n d"],
    ) -> Float[Tensor, "b n D"]:
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = wide(self.scale_shift_table + e).chunk(6, 1)
        h = self.attn1.hidden(h)
        y = modulate(wide(h), shift, scale, self.eps).type_as(h)
        h = (h + gate * self.attn1(y, rotary=rotary)).type_as(h)
        h = self.attn2.hidden(h)
        h = h + self.attn2(self.norm2(h), text, image)
        y = modulate(wide(h), shift_ffn, scale_ffn, self.eps).type_as(h)
        return (h + gate_ffn * self.ffn(y)).type_as(h)


class WanImageEmbedding(nn.Module):
    """CLIP tokens to the model's width: LN, MLP with the exact GELU, LN."""

    def __init__(self, image_dim: int, dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(image_dim), nn.LayerNorm(dim)
        self.ff = FeedForward(image_dim, image_dim, dim, approximate="none")

    def forward(self, x: Float[Tensor, "b i c"]) -> Float[Tensor, "b i D"]:
        return self.norm2(self.ff(self.norm1(x)))


class WanConditionEmbedding(nn.Module):
    """Timestep, prompt and image tokens to the model's width."""

    def __init__(self, c: WanConfig, dim: int):
        super().__init__()
        self.freq_dim = c.freq_dim
        self.time_embedder = Embedder(c.freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = Embedder(c.text_dim, dim, partial(F.gelu, approximate="tanh"))
        self.image_embedder = None if c.image_dim is None else WanImageEmbedding(c.image_dim, dim)

    def time(self, timestep: Real[Tensor, "b"], dtype: torch.dtype) -> tuple[Float[Tensor, "b 1 D"], Float[Tensor, "b 6 D"]]:
        """e and W silu(e)."""
        e = self.time_embedder(time_waves(timestep, self.freq_dim).to(dtype))
        return e[:, None], self.time_proj(F.silu(e)).unflatten(1, (6, -1))


# ---- the model -----------------------------------------------------------------------------------------------------------------------


class WanTransformer3DModel(Pretrained, nn.Module):
    """Velocity of video latents."""

    config_class = WanConfig
    tiny = "tiny-wan/transformer"

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = c = config
        dim = c.num_attention_heads * c.attention_head_dim
        self.patch_embedding = nn.Conv3d(c.in_channels, dim, c.patch_size, stride=c.patch_size)
        self.condition_embedder = WanConditionEmbedding(c, dim)
        self.blocks = nn.ModuleList(WanTransformerBlock(c, dim, i) for i in range(c.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, c.out_channels * math.prod(c.patch_size))
        self.init_weights()

    def forward(
        self,
        hidden_states: Float[Tensor, "b c T H W"],
        timestep: Real[Tensor, "b"],
        encoder_hidden_states: Float[Tensor, "b m text"],
        encoder_hidden_states_image: Float[Tensor, "b i clip"] | None = None,
    ) -> Float[Tensor, "b out T H W"]:
        """timestep in [0, 1000], 1000 = noise. The prompt may have any length; nothing is masked (the pipelines pad to 512 with zeros)."""
        if (encoder_hidden_states_image is None) != (self.condition_embedder.image_embedder is None):
            raise ValueError(
                "image tokens (encoder_hidden_states_image) belong to image-to-video models, whose config has image_dim, and only to them"
            )
        h = self.patch_embedding(hidden_states)
        grid = h.shape[2:]
        h = h.flatten(2).mT.contiguous()
        e, modulation = self.condition_embedder.time(timestep, h.dtype)
        text = self.condition_embedder.text_embedder(encoder_hidden_states)
        image = None if encoder_hidden_states_image is None else self.condition_embedder.image_embedder(encoder_hidden_states_image)
        rotary = rotary_table(grid, self.config.attention_head_dim, device=h.device).to(wide(modulation).dtype.to_complex())
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.grid = tuple(grid[1:])
        for block in self.blocks:
            h = block(h, modulation, text, image, rotary)
        shift, scale = wide(self.scale_shift_table + e).chunk(2, 1)
        h = self.proj_out(modulate(wide(h), shift, scale, self.config.eps).type_as(h))
        (t, rows, columns), (p, q, r) = grid, self.config.patch_size
        return rearrange(h, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", t=t, h=rows, w=columns, p=p, q=q, r=r)

    def init_weights(self) -> None:
        """For training from scratch: Xavier linears, zero biases, N(0, 0.02) prompt and time MLPs, zero output."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if "text_embedder" in name or "time_embedder" in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.proj_out.weight)

    @classmethod
    def rename(cls, name: str) -> str:
        return published_name(name)


ORIGINAL_NAMES = (  # pattern in the original release -> replacement
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
    (r"\.attn2\.([kv])_img\.", r".attn2.add_\1_proj."),
    (r"\.attn2\.norm_k_img\.", ".attn2.norm_added_k."),
)


def published_name(name: str) -> str:
    """The name here (diffusers') of a parameter of the original Wan release; names that are already diffusers' stay."""
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
