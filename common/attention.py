"""Attention, and the one way to watch or change it.

    S = scale * Q Kᵀ + bias       logits      b h n m
    P = softmax(S over m)         weights     b h n m
    O = P V                       heads       b h n d

`attend` computes O with the fused kernel. `Attention` is the base class of every attention layer of the project: it calls the same kernel,
unless a *control* is active, an object that may define any of seven stages (each gets the call's `Site` first; returning None leaves the
value as it is):

    hidden(site, x)           residual stream entering the layer, before its norm             b n c
    context(site, x, ctx)     source of the keys and values before projection, returns ctx    b m c
    qkv(site, q, k, v)        after norms and rotary embedding, returns all three             b h n d, b kv m d, b kv m d
    logits(site, s)           S, before masking                                               b h n m
    weights(site, p)          P, still in the graph                                           b h n m
    heads(site, o, q)         O before the output projection, returns o                       b h n d
    output(site, y)           after the output projection                                     b n c

    with controlled(model, control, where=lambda site: site.kind == "self" and site.layer >= 8):
        model(...)

S and P exist in memory only if an active control defines `logits` or `weights`; without a control the call is the plain one, bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

STAGES = ("hidden", "context", "qkv", "logits", "weights", "heads", "output")


# ---- the arithmetic ------------------------------------------------------------------------------------------------------------------


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b kv m d"],
    v: Float[Tensor, "b kv m e"],
    *,
    mask: Bool[Tensor, "#b #h #n m"] | None = None,
    bias: Float[Tensor, "#b #h #n m"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """softmax(scale q kᵀ + bias) v by the fused kernel; a query that may see no key gets zeros.

    mask: True where a query may see a key. causal: the n queries are the last n of the m positions. scale: default 1/√d.
    kv may divide h (grouped queries): key head j serves the query heads j·h/kv ... (j+1)·h/kv - 1.
    """
    if causal and q.shape[2] == k.shape[2] and mask is None and bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    mask = _visible(mask, causal, q.shape[2], k.shape[2], q.device)
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def attention_logits(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b kv m d"],
    *,
    bias: Float[Tensor, "#b #h #n m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n m"]:
    """S = scale q kᵀ + bias, unmasked."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = (q * scale) @ _per_query_head(k, q.shape[1]).transpose(-1, -2)
    return s if bias is None else s + bias


def masked_softmax(s: Float[Tensor, "b h n m"], mask: Bool[Tensor, "#b #h #n m"] | None = None) -> Float[Tensor, "b h n m"]:
    """P = softmax(S) over the visible keys, in float32 at least; rows without any are zero (and have a zero, not a NaN, gradient)."""
    wide = torch.float32 if s.dtype in (torch.float16, torch.bfloat16) else s.dtype
    if mask is None:
        return s.softmax(-1, dtype=wide).to(s.dtype)
    p = s.to(wide).masked_fill(~mask, torch.finfo(wide).min).softmax(-1)
    return p.masked_fill(~mask, 0).to(s.dtype)


def _visible(mask, causal, n, m, device):
    """The boolean mask of n queries and m keys with the causal one folded in."""
    if not causal or n == 1:
        return mask
    triangle = causal_mask(torch.arange(m - n, m, device=device), m)[None, None]
    return triangle if mask is None else mask & triangle


def _per_query_head(x: Float[Tensor, "b kv m d"], heads: int) -> Float[Tensor, "b h m d"]:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def split_heads(x: Float[Tensor, "b n hd"], heads: int) -> Float[Tensor, "b h n d"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(o: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n hd"]:
    return o.transpose(1, 2).flatten(2)


# ---- masks: each takes the positions of the query rows, so that a subset of the rows is masked like the whole -------------------------


def causal_mask(rows: Int[Tensor, "*r n"], m: int) -> Bool[Tensor, "*r n m"]:
    """Position i sees the keys 0..i."""
    return torch.arange(m, device=rows.device) <= rows[..., None]


def prefix_mask(rows: Int[Tensor, "*r n"], m: int, prefix: int) -> Bool[Tensor, "*r n m"]:
    """Causal, but the first `prefix` keys are seen by everyone."""
    return causal_mask(rows, m) | (torch.arange(m, device=rows.device) < prefix)


def sliding_window_mask(rows: Int[Tensor, "*r n"], m: int, window: int) -> Bool[Tensor, "*r n m"]:
    """Position i sees the `window` keys i-window+1..i."""
    return causal_mask(rows, m) & (torch.arange(m, device=rows.device) > rows[..., None] - window)


def decay_bias(rows: Int[Tensor, "*r n"], m: int, rate: float | Tensor) -> Float[Tensor, "*r n m"]:
    """Additive -rate·(i-j) on the keys j <= i, -inf after them: a causal mask whose weights decay by e^-rate a step."""
    distance = rows[..., None] - torch.arange(m, device=rows.device)
    return (-rate * distance).masked_fill(distance < 0, float("-inf"))


# ---- grouping of a map's tokens -------------------------------------------------------------------------------------------------------


def group(x: Float[Tensor, "b H W c"], size: tuple[int, int], interval: tuple[int, int] = (1, 1)) -> Float[Tensor, "bg n c"]:
    """Cut a map into groups of size[0] x size[1] tokens that lie `interval` apart; group index (b, region, offset), tokens row-major.

    Interval 1 gives adjacent windows. H and W must be multiples of size·interval.
    """
    (gh, gw), (ih, iw) = size, interval
    pattern = "b (rh gh ih) (rw gw iw) c -> (b rh rw ih iw) (gh gw) c"
    return rearrange(x, pattern, gh=gh, gw=gw, ih=ih, iw=iw)


def ungroup(x: Float[Tensor, "bg n c"], size: tuple[int, int], grid: tuple[int, int], interval: tuple[int, int] = (1, 1)) -> Float[Tensor, "b H W c"]:
    """The inverse of `group` for a map of grid = (H, W)."""
    (gh, gw), (ih, iw) = size, interval
    pattern = "(b rh rw ih iw) (gh gw) c -> b (rh gh ih) (rw gw iw) c"
    return rearrange(x, pattern, rh=grid[0] // (gh * ih), rw=grid[1] // (gw * iw), gh=gh, gw=gw, ih=ih, iw=iw)


# ---- the control ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Where an attention call happens."""

    name: str  # module path inside the controlled model
    kind: str  # "self", "cross" or "joint"
    layer: int  # index of the block
    heads: int
    grid: tuple[int, int] | None  # (H, W) where the queries are an image's tokens
    step: int | None  # the running step of a sampler, see `at_step`


@dataclass(eq=False)
class _Bound:
    """A control as one attention layer holds it."""

    control: Any
    where: Callable[[Site], bool]
    name: str


class Attention(nn.Module):
    """Base of all attention layers: `hidden`, `context`, `attend` and `output`, in this order, are the calls of a forward pass.

    A subclass projects, calls `self.attend(q, k, v)` for the per-head outputs, and projects back. `grid` is set by models whose tokens
    are images.
    """

    def __init__(self, heads: int, kind: str = "self", layer: int = 0):
        super().__init__()
        self.heads, self.kind, self.layer = heads, kind, layer
        self.grid: tuple[int, int] | None = None
        self.step: int | None = None
        self.controls: tuple[_Bound, ...] = ()

    def __getstate__(self) -> dict:
        """A copy of a controlled model is not controlled."""
        return self.__dict__ | {"controls": ()}

    def hidden(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """To be called by the block on the residual stream that enters this layer, before its norm."""
        return self._edit("hidden", x)

    def context(self, x: Float[Tensor, "b n c"], ctx: Float[Tensor, "b m e"]) -> Float[Tensor, "b k e"]:
        """To be called on the keys' source before projection; self-attention passes x twice."""
        return self._edit("context", ctx, lambda method, site, ctx: method(site, x, ctx))

    def attend(self, q, k, v, *, mask=None, bias=None, causal=False, scale=None) -> Float[Tensor, "b h n e"]:
        """`attend` with the stages qkv, logits, weights and heads around it.

        Keys that a control appends are visible to every query; to drop keys from a masked call, mask them in `logits` instead.
        """
        if not self.controls:
            return attend(q, k, v, mask=mask, bias=bias, causal=causal, scale=scale)
        n, m = q.shape[2], k.shape[2]
        q, k, v = self._edit("qkv", (q, k, v), lambda method, site, qkv: method(site, *qkv))
        explicit = self._defines("logits") or self._defines("weights")
        if explicit or k.shape[2] != m:  # else the kernel's own causal mask serves
            mask, causal = _visible(mask, causal, n, m, q.device), False
        mask, bias = _fit(mask, m, k.shape[2], True), _fit(bias, m, k.shape[2], 0.0)
        if explicit:
            s = self._edit("logits", attention_logits(q, k, bias=bias, scale=scale))
            p = self._edit("weights", masked_softmax(s, mask))
            o = p.to(v.dtype) @ _per_query_head(v, q.shape[1])
        else:
            o = attend(q, k, v, mask=mask, bias=bias, causal=causal, scale=scale)
        return self._edit("heads", o, lambda method, site, o: method(site, o, q))

    def output(self, y: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """To be called on the result of the output projection."""
        return self._edit("output", y)

    def _methods(self, stage: str) -> Iterator[tuple[Callable, Site]]:
        for bound in self.controls:
            # looked up on the class: a control that is a module may have a submodule called `heads` or `output`
            method = getattr(type(bound.control), stage, None)
            if callable(method):
                site = Site(bound.name, self.kind, self.layer, self.heads, self.grid, self.step)
                if bound.where(site):
                    yield method.__get__(bound.control), site

    def _defines(self, stage: str) -> bool:
        return any(True for _ in self._methods(stage))

    def _edit(self, stage: str, value, call=lambda method, site, value: method(site, value)):
        if self.controls:
            for method, site in self._methods(stage):
                edited = call(method, site, value)
                value = value if edited is None else edited
        return value


def _fit(x: Tensor | None, keys: int, m: int, fill) -> Tensor | None:
    """Widen a mask or bias from `keys` keys to m; one that is the same for all keys stays as it is."""
    if x is None or m == keys or (x.shape[-1] == 1 and keys > 1):
        return x
    if m < keys:
        raise ValueError(f"a control left {m} of {keys} keys of a masked attention call: mask keys in `logits` instead of dropping them")
    return F.pad(x, (0, m - keys), value=fill)


@contextmanager
def controlled(model: nn.Module, control: Any, where: Callable[[Site], bool] = lambda site: True):
    """Let `control` watch or change the attention calls of `model` at which `where(site)` holds; yields the control.

    Controls nest: the outer one acts first. They are removed on leaving, by an exception too. Raises ValueError for a model without
    `Attention` layers and for a control that defines no stage.
    """
    if not any(callable(getattr(type(control), stage, None)) for stage in STAGES):
        raise ValueError(f"{type(control).__name__} defines none of the stages {', '.join(STAGES)}")
    bounds = {layer: _Bound(control, where, name) for name, layer in model.named_modules() if isinstance(layer, Attention)}
    if not bounds:
        raise ValueError(f"{type(model).__name__} has no attention layer that can be controlled (none derives from common.attention.Attention)")
    for layer, bound in bounds.items():
        layer.controls += (bound,)
    try:
        yield control
    finally:
        for layer, bound in bounds.items():
            layer.controls = tuple(b for b in layer.controls if b is not bound)


def at_step(model: nn.Module, step: int | None) -> None:
    """Tell the sites of `model` which step of a sampler is running."""
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.step = step


# ---- the standard layer ---------------------------------------------------------------------------------------------------------------


class MultiHeadAttention(Attention):
    """Multi-head attention over x itself or over a context, with optional grouped key/value heads.

    dim: width of x and of the result. head_dim: default dim / heads. kv_heads: divides heads. context_dim: width of the context, which
    makes the layer a cross-attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        layer: int = 0,
    ):
        super().__init__(heads, "self" if context_dim is None else "cross", layer)
        self.kv_heads = kv_heads or heads
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} must divide heads = {heads}")
        if head_dim is None and dim % heads:
            raise ValueError(f"dim = {dim} is not a multiple of heads = {heads}: give head_dim")
        head_dim = head_dim or dim // heads
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim or dim, self.kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim or dim, self.kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(heads * head_dim, dim, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Bool[Tensor, "#b #h #n m"] | None = None,
        bias: Float[Tensor, "#b #h #n m"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b n c"]:
        context = self.context(x, x if context is None else context)
        q = split_heads(self.q_proj(x), self.heads)
        k, v = split_heads(self.k_proj(context), self.kv_heads), split_heads(self.v_proj(context), self.kv_heads)
        o = self.attend(q, k, v, mask=mask, bias=bias, causal=causal)
        return self.output(self.out_proj(merge_heads(o)))
