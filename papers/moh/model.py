"""Mixture-of-Head attention (Jin et al. 2024, arXiv 2410.11842).

    H^i = softmax(Q^i K^iᵀ / √d) V^i                                    (2)    one head                                         b h n d
    MHA(x) = Σ_i H^i W_O^i                                              (3)    W_O cut by rows into one block a head            b n c
    MoH(x)_t = Σ_i g_ti H^i_t W_O^i                                     (4)    heads are experts                                b n c
    g_ti = α₁ h_s softmax(W_s x_t)_i                                    (5)    shared heads i < h_s: active for every token
    g_ti = α₂ K p_ti / Σ_{j chosen} p_tj,   p_t = softmax(W_r x_t)             routed heads among the K largest p_ti; else 0
    [α₁, α₂] = 2 softmax(W_h x_t)                                       (6)    two-stage routing
    L_b = E · Σ_i P_i f_i                                               (7)    P_i = mean_t p_ti, f_i = share of tokens choosing i, of E heads

The factors h_s, K, 2 and E and the division by Σ p are the authors' code, not the paper's: they make the average gate 1. A trained MHA is
continued without new parameters: p_t = softmax(‖q_t^i‖ / std_i ‖q_t^i‖) over the routed heads' queries, and gates of 0 or 1

    g^q_ti = [i shared or chosen],   ∂L/∂g := ∂L/∂g^q                   (9-10) straight through to p_ti

The authors compute every H^i and multiply by g (`_masked`). `_sparse` computes only the rows H^i_t with g_ti ≠ 0: the query, the scores, the
value product and the block W_O^i. Keys and values are needed of all tokens, since a token that chose head i attends there to everybody.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from timm.layers import DropPath, trunc_normal_
from timm.models import VisionTransformer
from torch import Tensor, nn

from common.attention import Attention, causal_mask, masked_softmax, merge_heads, split_heads
from common.layers import GatedMlp, Mlp, PatchEmbed, RMSNorm, rotary, rotate_half, sinusoidal, sinusoidal_2d

BLOCK = 2**22  # elements of gathered tokens at a time in the sparse execution: they stay in a CPU's cache


@dataclass(frozen=True)
class Budget:
    """The heads of one layer. shared None: all of them for every token, ungated, plain multi-head attention."""

    heads: int
    shared: int | None = None  # h_s
    routed: int = 0  # K, of the E = heads - shared others
    two_stage: bool = True  # eq. 6; else α₁ = α₂ = 1
    router: Literal["learned", "norm"] = "learned"  # eqs. 5-6, or eqs. 9-10


class Routing(NamedTuple):
    """What a layer's router decided in its last forward pass."""

    p: Float[Tensor, "b n E"]
    chosen: Bool[Tensor, "b n E"]


# ---- gates ----------------------------------------------------------------------------------------------------------------------------


def route(scores: Float[Tensor, "b n E"], k: int) -> Routing:
    """p and the K largest of each token."""
    p = scores.softmax(-1)
    return Routing(p, torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(k, -1).indices, True))


def load_balance(routing: Routing) -> Float[Tensor, ""]:
    """Eq. 7. K where p and f are uniform; f carries no gradient."""
    p, chosen = routing
    return p.shape[-1] * (p.mean((0, 1)) * chosen.float().mean((0, 1))).sum()


def balance_loss(model: nn.Module) -> Float[Tensor, ""]:
    """Eq. 7 of the last forward pass, averaged over the layers that route; the task's loss plus β = 0.01 times this is minimised."""
    terms = [load_balance(m.routing) for m in model.modules() if isinstance(m, MoHAttention) and m.routing is not None]
    return torch.stack(terms).mean() if terms else torch.zeros(())


def run_sparse(model: nn.Module, sparse: bool = True) -> nn.Module:
    """Choose the execution of all MoH layers of a model."""
    for layer in model.modules():
        if isinstance(layer, MoHAttention):
            layer.sparse = sparse
    return model


def take(x: Float[Tensor, "b h n d"], rows: Int[Tensor, "b h r"] | None) -> Float[Tensor, "b h r d"]:
    """Some rows of each head, or all."""
    return x if rows is None else x.gather(2, rows[..., None].expand(*rows.shape, x.shape[-1]))


# ---- the layer ------------------------------------------------------------------------------------------------------------------------


class MoHAttention(Attention):
    """Eqs. 3-10. A model family names its projections, the queries being the first rows of `query_name`'s, and defines two methods:

    keys_values(x) -> tensors "b kv m d", all that `core` attends to;  core(q, kv, heads, rows) -> "b h r d", eq. 2 for the queries q of some
    heads (a slice) and of each the tokens at `rows` ("b h r", None for all).
    """

    query_name, out_name = "qkv", "proj"

    def __init__(self, dim: int, budget: Budget, head_dim: int | None = None, layer: int = 0):
        super().__init__(budget.heads, "self", layer)
        self.budget, self.head_dim = budget, head_dim or dim // budget.heads
        self.sparse, self.routing = False, None
        if budget.shared is None or budget.router == "norm":
            return
        if budget.routed:
            self.wg = nn.Linear(dim, budget.heads - budget.shared, bias=False)  # W_r
            if budget.shared and budget.two_stage:
                self.wg_0 = nn.Linear(dim, 2, bias=False)  # W_h
        if budget.shared > 1:
            self.wg_1 = nn.Linear(dim, budget.shared, bias=False)  # W_s

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        kv, b = self.keys_values(self.context(x, x)), self.budget
        # eq. 10 sends a gradient to heads that were not chosen, and a control expects to see all heads
        whole = b.shared is None or self.controls or (b.router == "norm" and self.training)
        return self.output(self._sparse(x, kv) if self.sparse and not whole else self._masked(x, kv))

    def gates(self, x: Float[Tensor, "b n c"], q: Float[Tensor, "b h n d"] | None) -> Float[Tensor, "b h n 1"]:
        """Eqs. 5-6, or eqs. 9-10 from the queries before any rotation. Keeps the routing."""
        b = self.budget
        shared, routed = x.new_ones(*x.shape[:2], b.shared), x[..., :0]
        if b.router == "norm":
            norms = rearrange(q[:, b.shared :].norm(dim=-1), "b h n -> b n h")
            p, chosen = self.routing = route(norms / norms.std(-1, keepdim=True), b.routed)
            routed = chosen + (p - p.detach()) if self.training else chosen.to(p.dtype)
        else:
            if b.shared > 1:
                shared = b.shared * self.wg_1(x).softmax(-1)
            if b.routed:
                p, chosen = self.routing = route(self.wg(x), b.routed)
                routed = b.routed * p * chosen / (p * chosen).sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).eps)
            if b.routed and b.shared and b.two_stage:
                alpha = 2 * self.wg_0(x).softmax(-1)
                shared, routed = alpha[..., :1] * shared, alpha[..., 1:] * routed
        return rearrange(torch.cat([shared, routed], -1), "b n h -> b h n 1")

    def _query_blocks(self, heads: slice) -> tuple[Float[Tensor, "h d c"], Float[Tensor, "h d"] | None]:
        layer, size = getattr(self, self.query_name), self.heads * self.head_dim
        return tuple(None if t is None else t[:size].unflatten(0, (self.heads, -1))[heads] for t in (layer.weight, layer.bias))

    def queries(self, x: Float[Tensor, "b n c"], heads: slice = slice(None)) -> Float[Tensor, "b h n d"]:
        """Q^i of all tokens, before any norm or rotation."""
        weight, bias = self._query_blocks(heads)
        return split_heads(F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten()), len(weight))

    def queries_of(self, x: Float[Tensor, "b n c"], heads: slice, tokens: Int[Tensor, "h br"]) -> Float[Tensor, "b h r d"]:
        """Q^i of some tokens of each head, numbered through the batch."""
        weight, bias = self._query_blocks(heads)
        q = x.flatten(0, 1).index_select(0, tokens.flatten()).unflatten(0, tokens.shape) @ weight.transpose(1, 2)
        return rearrange(q if bias is None else q + bias[:, None], "h (b r) d -> b h r d", b=len(x))

    def _masked(self, x: Float[Tensor, "b n c"], kv: tuple) -> Float[Tensor, "b n c"]:
        """Every head of every token, times its gate."""
        q = self.queries(x)
        o = self.core(q, kv, slice(None), None)
        if self.budget.shared is not None:
            o = o * self.gates(x, q)
        return getattr(self, self.out_name)(merge_heads(o))

    def _sparse(self, x: Float[Tensor, "b n c"], kv: tuple) -> Float[Tensor, "b n c"]:
        """The shared heads of every token, then of each routed head the tokens that chose it, padded to those of the busiest head.

        One grouped matrix product projects the queries of a block of heads, one fused call attends, one grouped product projects back.
        """
        s, out = self.budget.shared, getattr(self, self.out_name)
        q = self.queries(x) if self.budget.router == "norm" else None
        gates = self.gates(x, q)
        w_out = rearrange(out.weight, "c (h d) -> h d c", h=self.heads)
        shared = x.new_zeros(len(x), 0, x.shape[1], self.head_dim)
        if s:
            shared = gates[:, :s] * self.core(self.queries(x, slice(s)) if q is None else q[:, :s], kv, slice(s), None)
        y = F.linear(merge_heads(shared), out.weight[:, : s * self.head_dim], out.bias)
        if self.budget.routed:
            rows, kept = rows_of(self.routing.chosen)
            tokens = rows + x.shape[1] * torch.arange(len(x), device=x.device)[:, None, None]
            step = max(1, BLOCK // (len(x) * rows.shape[2] * x.shape[2]))
            for i in range(0, self.heads - s, step):
                heads, r = slice(s + i, s + i + step), rows[:, i : i + step]
                flat = rearrange(tokens[:, i : i + step], "b h r -> h (b r)")
                q_rows = self.queries_of(x, heads, flat) if q is None else take(q[:, heads], r)
                o = self.core(q_rows, kv, heads, r) * take(gates[:, heads], r) * kept[:, i : i + step]
                parts = rearrange(o, "b h r d -> h (b r) d") @ w_out[heads]
                y.flatten(0, 1).index_add_(0, flat.flatten(), parts.flatten(0, 1))
        return y


def rows_of(chosen: Bool[Tensor, "b n E"]) -> tuple[Int[Tensor, "b E r"], Bool[Tensor, "b E r 1"]]:
    """Of each routed head the positions of the tokens that chose it, in order, and which of them are not padding; r is the largest count."""
    chosen = rearrange(chosen, "b n h -> b h n")
    kept, rows = chosen.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
    r = int(chosen.sum(-1).max())
    return rows[..., :r], kept[..., :r, None].bool()


# ---- eq. 2 in three families ----------------------------------------------------------------------------------------------------------


class DotAttention(MoHAttention):
    """Plain scaled dot products: ViT and DiT. qk_norm: LayerNorm over d."""

    def __init__(self, dim: int, budget: Budget, head_dim: int | None = None, layer: int = 0, *, qkv_bias: bool = True, qk_norm: bool = False):
        super().__init__(dim, budget, head_dim, layer)
        self.qkv = nn.Linear(dim, 3 * self.heads * self.head_dim, bias=qkv_bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(self.heads * self.head_dim, dim)

    def keys_values(self, x):
        weight, bias = (None if t is None else t[self.heads * self.head_dim :] for t in (self.qkv.weight, self.qkv.bias))
        k, v = rearrange(F.linear(x, weight, bias), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        return self.k_norm(k), v

    def core(self, q, kv, heads, rows):
        k, v = (t[:, heads] for t in kv)
        return self.attend(self.q_norm(q), k, v)


class LlamaAttention(MoHAttention):
    """Rotary embedding, grouped key/value heads, causal; the names of Hugging Face's Llama."""

    query_name, out_name = "q_proj", "o_proj"

    def __init__(self, dim: int, budget: Budget, kv_heads: int, layer: int = 0, *, rope_theta: float = 10_000.0, bias: bool = False):
        super().__init__(dim, budget, layer=layer)
        self.kv_heads, self.rope_theta = kv_heads, rope_theta
        self.q_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(dim, kv_heads * self.head_dim, bias=bias) for _ in range(2))

    def keys_values(self, x):
        k, v = split_heads(self.k_proj(x), self.kv_heads), split_heads(self.v_proj(x), self.kv_heads)
        return rotate_half(k, *rotary(torch.arange(x.shape[1], device=x.device), self.head_dim, self.rope_theta)), v

    def core(self, q, kv, heads, rows):
        k, v = kv
        if q.shape[1] < self.heads:
            of_head = torch.arange(self.heads, device=q.device)[heads] // (self.heads // self.kv_heads)
            k, v = k[:, of_head], v[:, of_head]
        positions = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        q = rotate_half(q, *rotary(positions, self.head_dim, self.rope_theta))
        return self.attend(q, k, v, causal=True) if rows is None else self.attend(q, k, v, mask=causal_mask(rows, k.shape[2]))


class CosineAttention(DotAttention):
    """TransNeXt's last stage: softmax((q̂ + e_h) softplus(τ_h) ln(N) k̂ᵀ + B_h) v with unit vectors q̂, k̂ and a position bias B."""

    def __init__(self, dim: int, budget: Budget, grid: tuple[int, int], layer: int = 0):
        super().__init__(dim, budget, layer=layer)
        self.grid = grid
        _add_cosine_parameters(self, grid, grid)
        self.register_buffer("length", torch.tensor(grid[0] * grid[1]).float().log(), persistent=False)

    def keys_values(self, x):
        k, v = super().keys_values(x)
        return F.normalize(k, dim=-1), v

    def core(self, q, kv, heads, rows):
        k, v = (t[:, heads] for t in kv)
        q = (F.normalize(q, dim=-1) + self.query_embedding[heads]) * F.softplus(self.temperature[heads]) * self.length
        bias = position_bias(self)[heads].expand(len(q), -1, -1, -1)
        return self.attend(q, k, v, bias=take(bias, rows), scale=1.0)


class AggregatedAttention(MoHAttention):
    """TransNeXt's other stages: one softmax over the window x window neighbours of a token and a map pooled to 1/sr_ratio of the size.

    Heads = ((q̂ · learnable_tokens) + learnable_bias + P_local) v_local + P_pool v_pool. Every query has local keys of its own, so no fused
    kernel applies and a control finds the stages logits (the neighbours first), weights and heads.
    """

    query_name = "q"

    def __init__(self, dim: int, budget: Budget, grid: tuple[int, int], sr_ratio: int, layer: int = 0, window: int = 3):
        super().__init__(dim, budget, layer=layer)
        self.grid, self.pooled = grid, (grid[0] // sr_ratio, grid[1] // sr_ratio)
        h, d, w, n = budget.heads, self.head_dim, window**2, grid[0] * grid[1]
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr, self.norm = nn.Conv2d(dim, dim, 1), nn.LayerNorm(dim)
        _add_cosine_parameters(self, grid, self.pooled)
        self.relative_pos_bias_local = nn.Parameter(trunc_normal_(torch.empty(h, w), std=4e-4))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(h, d, w), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(h, 1, w))
        numbers = F.pad(torch.arange(n).float().reshape(1, 1, *grid), [window // 2] * 4, value=n)  # n stands for outside
        neighbours = rearrange(F.unfold(numbers, window), "1 w n -> n w").long()
        keys = (neighbours < n).sum(1, keepdim=True) + self.pooled[0] * self.pooled[1]
        self.register_buffer("neighbours", neighbours, persistent=False)
        self.register_buffer("length", keys.float().log(), persistent=False)

    def keys_values(self, x):
        pooled = F.gelu(self.sr(rearrange(x, "b (y x) c -> b c y x", y=self.grid[0])))
        pooled = self.norm(rearrange(F.adaptive_avg_pool2d(pooled, self.pooled), "b c y x -> b (y x) c"))
        kv = [rearrange(self.kv(t), "b n (two h d) -> two b h n d", two=2, h=self.heads) for t in (x, pooled)]
        (k, v), (k_pool, v_pool) = kv
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (F.normalize(k, dim=-1), v))  # the last row stands for outside
        return k, v, F.normalize(k_pool, dim=-1), v_pool

    def core(self, q, kv, heads, rows):
        k, v, k_pool, v_pool = (t[:, heads] for t in kv)
        near, length = (take(t.expand(*q.shape[:2], -1, -1), rows) for t in (self.neighbours, self.length))
        k, v = (take(t, near.flatten(2)).unflatten(2, near.shape[2:]) for t in (k, v))
        unit = F.normalize(q, dim=-1)
        q = (unit + self.query_embedding[heads]) * F.softplus(self.temperature[heads]) * length
        local = torch.einsum("bhrd,bhrwd->bhrw", q, k) + self.relative_pos_bias_local[heads, None]
        pool = q @ k_pool.transpose(-1, -2) + take(position_bias(self)[heads].expand(len(q), -1, -1, -1), rows)
        s = self._edit("logits", torch.cat([local, pool], -1))
        inside = F.pad(near < self.neighbours.shape[0], (0, pool.shape[-1]), value=True)
        p_local, p_pool = self._edit("weights", masked_softmax(s, inside)).tensor_split([near.shape[-1]], -1)
        p_local = p_local + unit @ self.learnable_tokens[heads] + self.learnable_bias[heads]
        o = torch.einsum("bhrw,bhrwd->bhrd", p_local, v) + p_pool @ v_pool
        return self._edit("heads", o, lambda method, site, o: method(site, o, q))


def _add_cosine_parameters(layer: MoHAttention, grid: tuple[int, int], key_grid: tuple[int, int]) -> None:
    """τ, e and the two-layer network of B, over log-spaced offsets between the tokens of a grid and the cells of a pooled one."""
    layer.temperature = nn.Parameter(torch.full((layer.heads, 1, 1), 1 / 0.24).expm1().log())  # softplus gives 1 / 0.24
    layer.query_embedding = nn.Parameter(trunc_normal_(torch.empty(layer.heads, 1, layer.head_dim), std=0.02))
    layer.cpb_fc1, layer.cpb_fc2 = nn.Linear(2, 512), nn.Linear(512, layer.heads)
    values, indices = zip(*map(_log_offsets, grid, key_grid), strict=True)
    index = indices[0][:, None, :, None] * len(values[1]) + indices[1][None, :, None, :]
    layer.register_buffer("offsets", torch.cartesian_prod(*values), persistent=False)
    layer.register_buffer("offset_index", index.reshape(grid[0] * grid[1], -1), persistent=False)


def _log_offsets(size: int, keys: int) -> tuple[Float[Tensor, "u"], Int[Tensor, "n k"]]:
    """Along one axis: the different values of sign(o) log2(|o| + 1) / log2(8), o = 8 (query - cell) / (size - 1), and which each pair has."""
    index = torch.arange(size, dtype=torch.float64, device="cpu")  # also where the model is built on "meta"
    offset = 8 * (index[:, None] - F.adaptive_avg_pool1d(index[None], keys)[0]) / max(1, size - 1)
    return (offset.sign() * (offset.abs() + 1).log2() / 3).float().unique(return_inverse=True)


def position_bias(layer: CosineAttention | AggregatedAttention) -> Float[Tensor, "h n m"]:
    """B."""
    table = layer.cpb_fc2(F.relu(layer.cpb_fc1(layer.offsets)))
    return rearrange(table[layer.offset_index], "n m h -> h n m")


# ---- models ---------------------------------------------------------------------------------------------------------------------------


def initialise(model: nn.Module, weights: Callable[[Tensor], Tensor]) -> None:
    """All linear layers, the routers among them, and zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weights(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """x ← x + attn(LN(x)),  x ← x + mlp(LN(x))."""

    def __init__(self, dim: int, attn: MoHAttention, mlp: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp, self.drop_path = attn, mlp, DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.attn(self.norm1(self.attn.hidden(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def vit(size: int, channels: int, patch: int, dim: int, budgets: Sequence[Budget], classes: int, mlp_ratio: float = 4) -> VisionTransformer:
    """timm's plain ViT with MoH in every block, the mean over the tokens and no class token."""
    body = {"class_token": False, "global_pool": "avg", "fc_norm": False, "depth": 0, "num_heads": budgets[0].heads}
    model = VisionTransformer(size, patch, channels, classes, embed_dim=dim, **body)
    model.blocks = nn.Sequential(*(Block(dim, DotAttention(dim, b, layer=i), Mlp(dim, int(dim * mlp_ratio))) for i, b in enumerate(budgets)))
    initialise(model, partial(nn.init.normal_, std=0.02))
    return model


class DiT(nn.Module):
    """Diffusion transformer: (noisy image, timestep, label) -> noise and, with learn_sigma, its variance's interpolation."""

    def __init__(
        self, size: int, channels: int, patch: int, dim: int, budgets: Sequence[Budget], classes: int = 1000, *,
        head_dim: int | None = None, mlp_ratio: float = 4, label_dropout: float = 0.1, learn_sigma: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.grid, self.label_dropout, self.classes = patch, size // patch, label_dropout, classes
        self.x_embedder = PatchEmbed(channels, dim, patch)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + (label_dropout > 0), dim)})
        self.pos_embed = nn.Parameter(sinusoidal_2d(dim, (self.grid, self.grid))[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(dim, DotAttention(dim, b, head_dim, i), mlp_ratio) for i, b in enumerate(budgets))
        outputs = patch**2 * channels * (2 if learn_sigma else 1)
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(dim, outputs), "adaLN_modulation": _modulation(dim, 2)})
        initialise(self, nn.init.xavier_uniform_)
        for last in [*(m.adaLN_modulation for m in self.blocks), self.final_layer["adaLN_modulation"], [self.final_layer["linear"]]]:
            nn.init.zeros_(last[-1].weight)

    def forward(self, x: Float[Tensor, "b c H W"], t: Float[Tensor, "b"], y: Int[Tensor, "b"]) -> Float[Tensor, "b co H W"]:
        if self.training:
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.label_dropout, self.classes)
        time = self.t_embedder["mlp"](sinusoidal(t, 256, cos_first=True).type_as(x))
        c = (time + self.y_embedder["embedding_table"](y))[:, None]
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer["linear"](modulate(x, *self.final_layer["adaLN_modulation"](c).chunk(2, -1)))
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid, p=self.patch, q=self.patch)


class DiTBlock(nn.Module):
    """Both halves are shifted, scaled and gated by c (adaLN-zero)."""

    def __init__(self, dim: int, attn: MoHAttention, mlp_ratio: float):
        super().__init__()
        self.attn, self.mlp = attn, Mlp(dim, int(dim * mlp_ratio), partial(F.gelu, approximate="tanh"))
        self.adaLN_modulation = _modulation(dim, 6)

    def forward(self, x: Float[Tensor, "b n c"], c: Float[Tensor, "b 1 c"]) -> Float[Tensor, "b n c"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.attn.hidden(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


def modulate(x: Float[Tensor, "b n c"], shift: Float[Tensor, "b 1 c"], scale: Float[Tensor, "b 1 c"]) -> Float[Tensor, "b n c"]:
    """LN(x) (1 + scale) + shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _modulation(dim: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class LlamaForCausalLM(nn.Module):
    """Token ids -> next-token logits."""

    def __init__(
        self, vocab: int, dim: int, ffn: int, budgets: Sequence[Budget], kv_heads: int | None = None, *,
        rope_theta: float = 10_000.0, eps: float = 1e-5, attention_bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        layers = []
        for i, budget in enumerate(budgets):
            attn = LlamaAttention(dim, budget, kv_heads or budget.heads, i, rope_theta=rope_theta, bias=attention_bias)
            norms = {name: RMSNorm(dim, eps) for name in ("input_layernorm", "post_attention_layernorm")}
            layers.append(nn.ModuleDict({"self_attn": attn, "mlp": GatedMlp(dim, ffn)} | norms))
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(vocab, dim), "layers": nn.ModuleList(layers), "norm": RMSNorm(dim, eps)})
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        initialise(self, partial(nn.init.normal_, std=0.02))

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n vocab"]:
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = x + layer["self_attn"](layer["input_layernorm"](layer["self_attn"].hidden(x)))
            x = x + layer["mlp"](layer["post_attention_layernorm"](x))
        return self.lm_head(self.model["norm"](x))
