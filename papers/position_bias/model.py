"""On the Emergence of Position Bias in Transformers (Wu et al., ICML 2025, arXiv 2502.01951).

A self-attention network (SAN): layers t = 0, 1, ... of one head, without output projection or norm, and an MLP on the last token.

    A^(t) = softmax(Q Kᵀ / √d + log M)                       attention map of layer t                                      b n n
    X^(t+1) = [X^(t) +] A^(t) X^(t) W_V^(t)                  [with residual]                                               b n d
    M_ij = 1 | [j ≤ i] | γ^(i-j) [j ≤ i] | [i-w < j ≤ i] | [j ≤ max(i, K)]      full, causal, decay, window, prefix          n n

Where does the context of token i come from? From token j with the probability of a walk through the maps, newest on the left:

    P^(t)(z_i = j) = (A^(t) A^(t-1) ... A^(0))_ij            t + 1 maps                                                     b n n

With ε the least allowed weight, tokens counted from 1, m = -log γ, x = i - j, scores in an interval of length I:

    4.1   causal        P^(t)(z_i = j) ≤ (1 - (j-1) ε)^(t+1)
    4.2   window w      P^(t)(z_i = j) ≤ (1 - (j-1) ε^h)^⌊(t+1)/h⌋,   h = ⌈(N-1)/(w-1)⌉
    4.3   prefix K      P^(t)(z_i = j) ≤ (1 - (j-K) ε)^(t+1),   j > K
    4.4   decay         C_min e^(-xm) ≤ A_ij ≤ C_max e^(-xm),   C_min = (1 - e^(-m)) e^(-I),   C_max = e^I / (1 + e^(-m)),   i > 1
    4.5   decay         P^(t)(z_i = j) = Θ(binom(t+x, x) e^(-xm)),   largest at x* = t / (e^m - 1)
    4.6   RoPE, d = 2   q_i k_j = s cos(x θ):   e^(-s x²θ²/2) ≤ A_ij / A_ii ≤ e^(-2 s x²θ²/π²),   |x θ| ≤ π

and for equal scores, exactly (N → ∞ in the second; the first is a Hausdorff matrix, whose powers have the moments (1/j)^(t+1)):

    causal        P^(t)(z_i = j) = binom(i-1, j-1) Σ_r (-1)^r binom(i-j, r) (j+r)^-(t+1)
    decay         P^(t)(z_i = j) = (1 - e^(-m))^(t+1) binom(t+x, x) e^(-xm)
"""

import math
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.attention import Attention, Site, causal_mask, controlled, decay_bias, merge_heads, prefix_mask, sliding_window_mask, split_heads
from common.layers import rotary, rotate_pairs

# ---- the network ------------------------------------------------------------------------------------------------------------------------


def log_mask(kind: str, n: int, *, gamma: float = 0.8, window: int = 9, prefix: int = 3) -> Float[Tensor, "n n"]:
    """log M in float64, what a mask adds to the scores. Raises ValueError for an unknown kind."""
    rows = torch.arange(n)
    if kind == "decay":
        return decay_bias(rows, n, torch.tensor(-math.log(gamma), dtype=torch.float64))
    masks = {"causal": causal_mask(rows, n), "window": sliding_window_mask(rows, n, window), "prefix": prefix_mask(rows, n, prefix)}
    masks["full"] = torch.ones(n, n, dtype=torch.bool)
    if kind not in masks:
        raise ValueError(f"mask {kind!r}: take full, causal, decay, window or prefix")
    return torch.zeros(n, n, dtype=torch.float64).masked_fill(~masks[kind], float("-inf"))


class SelfAttention(Attention):
    """A X W_V, one head. rope: rotate queries and keys, the planes being neighbouring channels, by position · base^(-2c/d)."""

    def __init__(self, dim: int, hidden: int, *, rope: bool = False, base: float = 10_000.0, bias: bool = False, layer: int = 0):
        super().__init__(1, "self", layer)
        self.rope, self.base = rope, base
        self.query_projection, self.key_projection, self.value_projection = (nn.Linear(dim, hidden, bias=bias) for _ in range(3))

    def forward(self, x: Float[Tensor, "b n c"], log_mask: Float[Tensor, "n n"]) -> Float[Tensor, "b n d"]:
        context = self.context(x, x)
        q, k, v = (split_heads(y, 1) for y in (self.query_projection(x), self.key_projection(context), self.value_projection(context)))
        if self.rope:
            turns = torch.complex(*rotary(torch.arange(x.shape[1], device=x.device), q.shape[-1], self.base))
            q, k = rotate_pairs(q, turns), rotate_pairs(k, turns)
        return self.output(merge_heads(self.attend(q, k, v, bias=log_mask)))


class SAN(nn.Module):
    """(b, n, in_channels) -> logits (b, out_channels) of the last token, with the authors' argument and parameter names.

    mask: see `log_mask`, whose gamma, window and prefix may follow. position: "none", "sin" (sinusoids added to the input) or "rope" (in
    every layer). A decay mask is a position encoding by itself. Raises ValueError for a residual between different widths.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_attn_layers: int,
        num_mlp_layers: int = 3,
        *,
        mask: str = "causal",
        position: str = "none",
        residual: bool = False,
        base: float = 10_000.0,
        bias: bool = False,
        **mask_options,
    ):
        super().__init__()
        if residual and in_channels != hidden_channels:
            raise ValueError(f"a residual needs in_channels = hidden_channels, got {in_channels} and {hidden_channels}")
        if position not in ("none", "sin", "rope"):
            raise ValueError(f"position {position!r}: take none, sin or rope")
        self.mask, self.position, self.residual, self.mask_options = mask, position, residual, mask_options
        widths = [in_channels] + [hidden_channels] * num_attn_layers
        self.attn_layers = nn.ModuleList(
            SelfAttention(dim, hidden_channels, rope=position == "rope", base=base, bias=bias, layer=t) for t, dim in enumerate(widths[:-1])
        )
        self.mlp_layers = nn.ModuleList(nn.Linear(hidden_channels, hidden_channels) for _ in range(num_mlp_layers))
        self.lin = nn.Linear(hidden_channels, out_channels)

    def log_mask(self, n: int) -> Float[Tensor, "n n"]:
        """log M for n tokens, in float64."""
        return log_mask(self.mask, n, **self.mask_options)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b out"]:
        m = self.log_mask(x.shape[1]).to(x)
        if self.position == "sin":
            x = x + sinusoid(x.shape[1], x.shape[2]).to(x)
        for layer in self.attn_layers:
            x = layer.hidden(x)
            update = layer(x, m)
            x = x + update if self.residual else update
        x = x[:, -1]
        for linear in self.mlp_layers:
            x = linear(x).relu()
        return self.lin(x)


def sinusoid(n: int, dim: int) -> Float[Tensor, "n dim"]:
    """sin(p f_c) on the even channels 2c, cos(p f_c) on the odd ones, f_c = 10000^(-2c/dim)."""
    angle = torch.arange(n)[:, None] * (torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim)).exp()
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


# ---- where the context comes from -------------------------------------------------------------------------------------------------------


class Maps:
    """A control that keeps the attention map of every layer, averaged over its heads."""

    def __init__(self):
        self.maps: list[Float[Tensor, "b n n"]] = []

    def weights(self, site: Site, p: Float[Tensor, "b h n n"]) -> None:
        self.maps.append(p.mean(1))


@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor) -> Float[Tensor, "b t n n"]:
    """A^(0), A^(1), ... of any model whose attention can be watched."""
    with controlled(model, Maps()) as watched:
        model(x)
    return torch.stack(watched.maps, 1)


def equal_scores(log_mask: Float[Tensor, "n n"], layers: int) -> Float[Tensor, "t n n"]:
    """The maps of a network whose scores are all equal: no content, only the mask."""
    return log_mask.double().softmax(-1).expand(layers, -1, -1)


def rollout(maps: Float[Tensor, "*b t n n"]) -> Float[Tensor, "*b t n n"]:
    """P^(t) = A^(t) ... A^(0) for every t."""
    walks = [maps.select(-3, 0)]
    for a in maps.unbind(-3)[1:]:
        walks.append(a @ walks[-1])
    return torch.stack(walks, -3)


def last_rows(a: Float[Tensor, "n n"], layers: int) -> Float[Tensor, "t n"]:
    """P^(t)(z_N = j) when all maps equal a."""
    rows = [a[-1]]
    for _ in range(layers - 1):
        rows.append(rows[-1] @ a)
    return torch.stack(rows)


def least_weight(maps: Float[Tensor, "*b t n n"], log_mask: Float[Tensor, "n n"]) -> float:
    """ε: the least weight on a pair that the mask allows."""
    return maps[..., log_mask > float("-inf")].min().item()


def sink(maps: Float[Tensor, "b t n n"]) -> list[float]:
    """Mean weight that each token receives from itself and the queries after it, over layers and sequences."""
    received = maps.mean((0, 1)).tril()
    return (received.sum(0) / torch.arange(len(received), 0, -1)).tolist()


# ---- theorems ---------------------------------------------------------------------------------------------------------------------------


def concentration_bound(epsilon: float, layers: int, n: int, *, centre: int = 1, hops: int = 1) -> Float[Tensor, "t 1 n"]:
    """Theorems 4.1-4.3, for every t, any i and every j.

    centre: number of centre nodes, 1 or K. hops: h, maps until every token can have reached the first; 1 without a window. A walk that has
    stayed at j or beyond leaves within h maps with probability (j - centre) ε^h at least, and never comes back: hence C = 1.
    """
    beyond = (torch.arange(1, n + 1, dtype=torch.float64) - centre).clamp(min=0)
    tries = torch.arange(1, layers + 1)[:, None, None] // hops
    return (1 - beyond * epsilon**hops) ** tries


def window_hops(n: int, window: int) -> int:
    """h of Theorem 4.2."""
    return math.ceil((n - 1) / (window - 1))


def decay_bounds(distance: Float[Tensor, "n n"], m: float, score_range: float) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Lemma 4.4: the least and the largest weight at each distance i - j, for i > 1."""
    decay = (-distance * m).exp()
    return (1 - math.exp(-m)) * math.exp(-score_range) * decay, math.exp(score_range) / (1 + math.exp(-m)) * decay


def decay_peak(t: int, m: float) -> float:
    """x* of Theorem 4.5."""
    return t / math.expm1(m)


def rope_scores(n: int, theta: float, s: float) -> Float[Tensor, "n n"]:
    """Scores s cos((i - j) θ) under a causal mask: RoPE with d = 2 and the same q = k everywhere."""
    position = torch.arange(n, dtype=torch.float64)
    return s * ((position[:, None] - position) * theta).cos() + log_mask("causal", n)


def rope_bounds(distance: Float[Tensor, "n"], theta: float, s: float) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Lemma 4.6: the least and the largest A_ij / A_ii at each distance."""
    u = (distance * theta) ** 2
    return (-s * u / 2).exp(), (-2 * s * u / math.pi**2).exp()


# ---- closed forms for equal scores ------------------------------------------------------------------------------------------------------


def causal_walk(n: int, layers: int) -> Float[Tensor, "n n"]:
    """P^(layers-1) under a causal mask, in exact fractions (the sum alternates) before it is rounded once."""
    entry = lambda i, j: math.comb(i - 1, j - 1) * sum((-1) ** r * math.comb(i - j, r) * Fraction(1, (j + r) ** layers) for r in range(i - j + 1))
    return torch.tensor([[float(entry(i, j)) for j in range(1, n + 1)] for i in range(1, n + 1)], dtype=torch.float64)


def decay_walk(n: int, t: int, m: float) -> Float[Tensor, "n"]:
    """log P^(t)(z_i = i - x) for x = 0..n-1 under a decay mask, where token 1 is far."""
    logs = [math.log(math.comb(t + x, x)) - x * m for x in range(n)]
    return (t + 1) * math.log(-math.expm1(-m)) + torch.tensor(logs, dtype=torch.float64)
