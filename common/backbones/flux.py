"""FLUX.1 (Black Forest Labs 2024): a transformer over text and image tokens, with the parameter names of diffusers' FluxTransformer2DModel.

    e = time(1000 t) + guide(1000 g) + pool(p)                     what modulates a branch                        b D
    shift, scale, gate = W silu(e) + b                             M(z) = LN(z) (1 + scale) + shift
    q = R(norm W_q M(z)),  k = R(norm W_k M(z)),  v = W_v M(z)     R rotates by the position ids                  b h n d
    o = softmax(q kᵀ/√d) v                                         over the keys of all branches it may read      b h n d

    double block  z ← z + gate W_o o;  z ← z + gate' W₂ gelu(W₁ M'(z))    one set of weights for text, one for images
    single block  z ← z + gate W [o ; gelu(W_m M(z))]                     one set of weights for all
    velocity      W M(x)                                                  of the image

The published model has two branches, text and image, which read each other. A `Branch` has its own positions, timestep and LoRA adapter, so
that condition images can be further branches (OminiControl). How branches read each other is one function, the *mix*: `Visible` is the
usual one, a method replaces it. A condition that reads only itself depends on neither the noise nor the timestep, so its keys and values
can be computed once:

    model.velocity([text, image, edges, depth])                       edges, depth: branches with timestep 0
    cache = model.condition_cache([edges, depth])                     the same for every later step
    model.velocity([text, image], Cached(cache))
"""

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Complex, Float, Real
from torch import Tensor, nn

from common.attention import Attention, merge_heads, split_heads
from common.backbones.pretrained import Pretrained
from common.layers import frequencies, rotate_pairs, time_waves
from common.lora import adapter


@dataclass
class FluxConfig:
    """The fields of the published config.json; the defaults are FLUX.1-dev's."""

    patch_size: int = 1
    in_channels: int = 64  # a packed token: 2 x 2 latents of 16 channels
    out_channels: int | None = None  # default in_channels
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # width of the text states
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # shares of a head, one per axis of the position ids


# ---- tokens and positions ------------------------------------------------------------------------------------------------------------


def pack(latents: Float[Tensor, "b c H W"], patch: int = 2) -> Float[Tensor, "b n c_p_p"]:
    """Patches of the latents as tokens, row-major, channel first inside a token."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpack(tokens: Float[Tensor, "b n c_p_p"], grid: tuple[int, int], patch: int = 2) -> Float[Tensor, "b c H W"]:
    """The inverse of `pack` for grid = (rows, columns) of tokens."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)


def image_ids(grid: tuple[int, int], *, device=None) -> Float[Tensor, "n 3"]:
    """Position (0, row, column) of each token of an image. Text tokens have the position (0, 0, 0)."""
    rows, columns = (torch.arange(size, dtype=torch.float32, device=device) for size in grid)
    return torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)


def rotary_table(ids: Real[Tensor, "n axes"], dims: tuple[int, ...]) -> Complex[Tensor, "n d"]:
    """e^(i · position · f) for the planes of a head, dims[j] / 2 of them for axis j; in float64, for positions times frequencies get large."""
    ids = ids.double()
    angle = torch.cat([ids[:, j, None] * frequencies(dim, dtype=ids.dtype, device=ids.device) for j, dim in enumerate(dims)], -1)
    return torch.polar(torch.ones_like(angle), angle)


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- branches ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What modulates the tokens of a branch; branches that share the object are computed together."""

    timestep: Float[Tensor, "b"]  # in [0, 1], 1 = noise; 0 for a condition
    pooled: Float[Tensor, "b p"]  # pooled text vector
    guidance: Float[Tensor, "b"] | None = None


@dataclass(frozen=True)
class Branch:
    """Tokens with their positions. "text" and "image" name those of the published model; any other name is a condition image."""

    name: str
    tokens: Float[Tensor, "b n c"]  # text states, or packed latents
    ids: Real[Tensor, "n 3"]
    conditioning: Conditioning
    adapter: str | None = None  # LoRA active in this branch


@dataclass(frozen=True)
class Stream:
    """Branches with the same weights and conditioning, as one sequence; what the blocks need of them besides the tokens."""

    sizes: dict[str, int]  # tokens of each branch
    conditioning: Conditioning
    adapter: str | None
    e: Float[Tensor, "b D"]
    rotary: Complex[Tensor, "n d"]

    @property
    def is_text(self) -> bool:
        return list(self.sizes) == ["text"]

    def split(self, x: Tensor, dim: int) -> dict[str, Tensor]:
        """x by branch."""
        return dict(zip(self.sizes, x.split(list(self.sizes.values()), dim), strict=True))


def merge(streams: list[Stream], xs: list[Tensor], alike: Callable[[Stream], Hashable]) -> tuple[list[Stream], list[Tensor]]:
    """One stream of all those for which `alike` is the same."""
    groups = defaultdict(list)
    for stream, x in zip(streams, xs, strict=True):
        groups[alike(stream)].append((stream, x))
    merged = []
    for members in groups.values():
        sizes = {name: size for stream, _ in members for name, size in stream.sizes.items()}
        whole = replace(members[0][0], sizes=sizes, rotary=torch.cat([stream.rotary for stream, _ in members]))
        merged.append((whole, torch.cat([x for _, x in members], 1)))
    return [stream for stream, _ in merged], [x for _, x in merged]


def each(streams: list[Stream], f: Callable, *columns: list) -> list:
    """f(stream, ...) for every stream, under the stream's adapter."""
    results = []
    for stream, *arguments in zip(streams, *columns, strict=True):
        with adapter(stream.adapter):
            results.append(f(stream, *arguments))
    return results


Heads = tuple[Float[Tensor, "b h _ d"] | None, Float[Tensor, "b h _ d"], Float[Tensor, "b h _ d"]]  # q (None: only read), k, v
Mix = Callable[["FluxAttention", dict[str, Heads]], dict[str, Float[Tensor, "b h _ d"]]]


def independent(reader: str, source: str) -> bool:
    """The default visibility: text and image read everything, a condition only itself."""
    return reader in ("text", "image") or reader == source


class Visible:
    """The usual mix: softmax attention of every branch over the keys of the branches it sees.

    see(a, b) is the boolean matrix: whether the queries of branch a use the keys of branch b. A method that mixes otherwise is called
    alike, as mix(attention, branches), once a layer, with the q, k, v of every branch after norm and rotation; it returns the outputs of
    the branches whose q is not None, and knows the layer by attention.layer.
    """

    def __init__(self, see: Callable[[str, str], bool] = independent):
        self.see = see

    def __call__(self, attention: "FluxAttention", branches: dict[str, Heads]) -> dict[str, Float[Tensor, "b h _ d"]]:
        readers = defaultdict(list)  # branches that see the same keys are one attention call
        for reader, (q, _, _) in branches.items():
            if q is not None:
                readers[tuple(source for source in branches if self.see(reader, source))].append(reader)
        outputs = {}
        for sources, names in readers.items():
            queries = [branches[name][0] for name in names]
            k, v = (torch.cat([branches[source][i] for source in sources], 2) for i in (1, 2))
            o = attention.attend(torch.cat(queries, 2), k, v, reader=names[-1])
            outputs |= zip(names, o.split([q.shape[2] for q in queries], 2), strict=True)
        return outputs


@dataclass(frozen=True)
class Cached:
    """A mix in which the branches of a `condition_cache` are read, but no longer computed."""

    cache: dict[int, dict[str, Heads]]  # by layer
    mix: Mix = field(default_factory=Visible)

    def __call__(self, attention: "FluxAttention", branches: dict[str, Heads]) -> dict[str, Float[Tensor, "b h _ d"]]:
        return self.mix(attention, branches | self.cache[attention.layer])


# ---- layers --------------------------------------------------------------------------------------------------------------------------


class FluxAttention(Attention):
    """Joint attention of the streams; one set of projections for all, as single blocks have it, which also lack an output projection.

    A control sees `hidden`, `context` and `output` of all branches in one sequence, whose length it must keep, and the other stages in
    each call of `attend`. The site's grid is the image's, whose tokens follow the text, or a condition's where that reads alone.
    """

    def __init__(self, dim: int, heads: int, layer: int):
        super().__init__(heads, "joint", layer)
        self.grids: dict[str, tuple[int, int]] = {}
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6), nn.RMSNorm(dim // heads, eps=1e-6)

    def forward(self, ys: list[Float[Tensor, "b _ D"]], streams: list[Stream], mix: Mix) -> list[Float[Tensor, "b _ D"]]:
        sources = self.whole(lambda y: self.context(y, y), ys)
        outputs = mix(self, {name: heads for part in each(streams, self.project, ys, sources) for name, heads in part.items()})
        return [torch.cat([merge_heads(outputs[name]) for name in stream.sizes], 1) for stream in streams]

    def project(self, stream: Stream, y: Float[Tensor, "b n D"], source: Float[Tensor, "b n D"]) -> dict[str, Heads]:
        to_q, to_k, to_v, norm_q, norm_k = self.projections(stream)
        q, k = norm_q(split_heads(to_q(y), self.heads)), norm_k(split_heads(to_k(source), self.heads))
        v = split_heads(to_v(source), self.heads)
        q, k, v = (stream.split(t, 2) for t in (rotate_pairs(q, stream.rotary), rotate_pairs(k, stream.rotary), v))
        return {name: (q[name], k[name], v[name]) for name in stream.sizes}

    def projections(self, stream: Stream) -> tuple[nn.Module, ...]:
        return self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k

    def attend(self, q, k, v, *, reader: str = "image", **kwargs) -> Float[Tensor, "b h n d"]:
        """`Attention.attend` with the grid of the branch `reader` in the site."""
        self.grid = self.grids.get(reader)
        o = super().attend(q, k, v, **kwargs)
        self.grid = self.grids.get("image")
        return o

    def whole(self, stage: Callable, xs: list[Tensor]) -> list[Tensor]:
        """A stage of the controls on all tokens as one sequence."""
        return list(stage(torch.cat(xs, 1)).split([x.shape[1] for x in xs], 1)) if self.controls else xs


class FluxDoubleAttention(FluxAttention):
    """The same with a second set of projections for text, and with output projections."""

    def __init__(self, dim: int, heads: int, layer: int):
        super().__init__(dim, heads, layer)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_added_q, self.norm_added_k = nn.RMSNorm(dim // heads, eps=1e-6), nn.RMSNorm(dim // heads, eps=1e-6)
        self.to_out, self.to_add_out = nn.Sequential(nn.Linear(dim, dim)), nn.Linear(dim, dim)

    def forward(self, ys: list[Float[Tensor, "b _ D"]], streams: list[Stream], mix: Mix) -> list[Float[Tensor, "b _ D"]]:
        os = super().forward(ys, streams, mix)
        return self.whole(self.output, each(streams, lambda stream, o: (self.to_add_out if stream.is_text else self.to_out)(o), os))

    def projections(self, stream: Stream) -> tuple[nn.Module, ...]:
        if stream.is_text:
            return self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k
        return super().projections(stream)


class FluxTransformerBlock(nn.Module):
    """Double block: text has its own weights in every part."""

    def __init__(self, dim: int, heads: int, layer: int):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = FluxDoubleAttention(dim, heads, layer)
        self.ff, self.ff_context = FeedForward(dim, 4 * dim), FeedForward(dim, 4 * dim)

    def forward(self, xs: list[Float[Tensor, "b _ D"]], streams: list[Stream], mix: Mix) -> list[Float[Tensor, "b _ D"]]:
        xs = self.attn.whole(self.attn.hidden, xs)
        vectors = each(streams, lambda stream: (self.norm1_context if stream.is_text else self.norm1)(stream.e))
        ys = [modulate(x, shift, scale) for x, (shift, scale, *_) in zip(xs, vectors, strict=True)]
        return each(streams, self.update, xs, self.attn(ys, streams, mix), vectors)

    def update(self, stream: Stream, x, o, vectors) -> Float[Tensor, "b n D"]:
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = vectors
        x = x + gate * o
        return x + gate_mlp * (self.ff_context if stream.is_text else self.ff)(modulate(x, shift_mlp, scale_mlp))


class FluxSingleTransformerBlock(nn.Module):
    """Single block: attention and MLP side by side, one output projection; to a control its result is the layer's `output`."""

    def __init__(self, dim: int, heads: int, layer: int):
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)
        self.attn = FluxAttention(dim, heads, layer)

    def forward(self, xs: list[Float[Tensor, "b _ D"]], streams: list[Stream], mix: Mix) -> list[Float[Tensor, "b _ D"]]:
        xs = self.attn.whole(self.attn.hidden, xs)
        vectors = each(streams, lambda stream: self.norm(stream.e))
        ys = [modulate(x, shift, scale) for x, (shift, scale, _) in zip(xs, vectors, strict=True)]
        updates = self.attn.whole(self.attn.output, each(streams, self.update, ys, self.attn(ys, streams, mix)))
        return [x + gate * update for x, (_, _, gate), update in zip(xs, vectors, updates, strict=True)]

    def update(self, stream: Stream, y, o) -> Float[Tensor, "b n D"]:
        return self.proj_out(torch.cat([o, F.gelu(self.proj_mlp(y), approximate="tanh")], -1))


class Modulation(nn.Module):
    """W silu(e) + b in `parts` vectors; zero at the start, so that every block begins as the identity (AdaLN-Zero)."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, e: Float[Tensor, "b D"]) -> tuple[Float[Tensor, "b 1 D"], ...]:
        return self.linear(F.silu(e))[:, None].chunk(self.parts, -1)


def modulate(x: Float[Tensor, "b n D"], shift: Float[Tensor, "b 1 D"], scale: Float[Tensor, "b 1 D"], eps: float = 1e-6) -> Float[Tensor, "b n D"]:
    """M(x) = LN(x) (1 + scale) + shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class FeedForward(nn.Module):
    """net.2(gelu(net.0.proj(x))); the tanh form of the GELU unless told otherwise."""

    def __init__(self, dim: int, hidden: int, out: int | None = None, *, approximate: str = "tanh"):
        super().__init__()
        projection = nn.ModuleDict({"proj": nn.Linear(dim, hidden)})
        self.net = nn.ModuleDict({"0": projection, "2": nn.Linear(hidden, out or dim)})
        self.approximate = approximate

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b out"]:
        return self.net["2"](F.gelu(self.net["0"]["proj"](x), approximate=self.approximate))


class Embedder(nn.Module):
    """linear_2(act(linear_1(x)))."""

    def __init__(self, in_dim: int, dim: int, act: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.linear_1, self.linear_2, self.act = nn.Linear(in_dim, dim), nn.Linear(dim, dim), act

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b D"]:
        return self.linear_2(self.act(self.linear_1(x)))


class ConditioningEmbedding(nn.Module):
    """e = time(1000 t) + guide(1000 g) + pool(p), times and guidance as 256 sinusoids."""

    def __init__(self, dim: int, pooled_dim: int, guidance: bool):
        super().__init__()
        self.timestep_embedder = Embedder(256, dim)
        self.guidance_embedder = Embedder(256, dim) if guidance else None
        self.text_embedder = Embedder(pooled_dim, dim)

    def forward(self, timestep: Float[Tensor, "b"], pooled: Float[Tensor, "b p"], guidance: Float[Tensor, "b"] | None) -> Float[Tensor, "b D"]:
        waves = lambda x: time_waves(1000 * x, 256).to(pooled.dtype)
        e = self.timestep_embedder(waves(timestep)) + self.text_embedder(pooled)
        if self.guidance_embedder is None:
            return e
        if guidance is None:
            raise ValueError("this checkpoint is distilled with guidance: pass guidance, the scale of each sample (FLUX.1-dev: 3.5)")
        return e + self.guidance_embedder(waves(guidance))


# ---- the model -----------------------------------------------------------------------------------------------------------------------


class FluxTransformer2DModel(Pretrained, nn.Module):
    """Velocity of packed latents."""

    config_class = FluxConfig
    tiny = "tiny-flux/transformer"

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        heads, dim = config.num_attention_heads, config.num_attention_heads * config.attention_head_dim
        if sum(config.axes_dims_rope) != config.attention_head_dim:
            raise ValueError(f"axes_dims_rope {tuple(config.axes_dims_rope)} must sum to attention_head_dim = {config.attention_head_dim}")
        self.time_text_embed = ConditioningEmbedding(dim, config.pooled_projection_dim, config.guidance_embeds)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.x_embedder = nn.Linear(config.in_channels, dim)
        double, single = config.num_layers, config.num_single_layers
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(dim, heads, i) for i in range(double))
        self.single_transformer_blocks = nn.ModuleList(FluxSingleTransformerBlock(dim, heads, double + i) for i in range(single))
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * (config.out_channels or config.in_channels))
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self,
        hidden_states: Float[Tensor, "b n c"],
        encoder_hidden_states: Float[Tensor, "b m joint"],
        pooled_projections: Float[Tensor, "b p"],
        timestep: Float[Tensor, "b"],
        img_ids: Float[Tensor, "n 3"],
        txt_ids: Float[Tensor, "m 3"],
        guidance: Float[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n out"]:
        """The published model: text and image. timestep in [0, 1], 1 = noise."""
        shared = Conditioning(timestep, pooled_projections, guidance)
        return self.velocity([Branch("text", encoder_hidden_states, txt_ids, shared), Branch("image", hidden_states, img_ids, shared)])

    def velocity(self, branches: list[Branch], mix: Mix | None = None) -> Float[Tensor, "b n out"]:
        """Velocity of the branch "image" among `branches`, in the order text, image, conditions."""
        if "image" not in [branch.name for branch in branches]:
            raise ValueError('one of the branches must be named "image": its velocity is asked for')
        [(image, x)] = [(stream, x) for stream, x in zip(*self.run(branches, mix or Visible()), strict=True) if "image" in stream.sizes]
        with adapter(image.adapter):
            scale, shift = self.norm_out(image.e)  # the published order, unlike the blocks'
            return self.proj_out(modulate(image.split(x, 1)["image"], shift, scale))

    def condition_cache(self, conditions: list[Branch], mix: Mix | None = None) -> dict[int, dict[str, Heads]]:
        """Keys and values of conditions that read only each other, for `Cached`: exact at every timestep and for every image."""
        cache, mix = {}, mix or Visible()

        def recording(attention: FluxAttention, branches: dict[str, Heads]) -> dict[str, Float[Tensor, "b h _ d"]]:
            cache[attention.layer] = {name: (None, k, v) for name, (_, k, v) in branches.items()}
            return mix(attention, branches)

        self.run(conditions, recording)
        return cache

    def run(self, branches: list[Branch], mix: Mix) -> tuple[list[Stream], list[Float[Tensor, "b _ D"]]]:
        """All blocks; the streams and their final states."""
        if len({branch.name for branch in branches}) < len(branches):
            raise ValueError(f"each branch needs a name of its own, got {[branch.name for branch in branches]}")
        conditioning = dict.fromkeys(branch.conditioning for branch in branches)
        e = {c: self.time_text_embed(c.timestep, c.pooled, c.guidance) for c in conditioning}
        streams = [self.stream(branch, e[branch.conditioning]) for branch in branches]
        tokens = [branch.tokens for branch in branches]
        self.tell_grids(branches)
        streams, tokens = merge(streams, tokens, lambda s: (s.is_text, s.conditioning, s.adapter))
        xs = each(streams, lambda stream, x: (self.context_embedder if stream.is_text else self.x_embedder)(x), tokens)
        for block in self.transformer_blocks:
            xs = block(xs, streams, mix)
        streams, xs = merge(streams, xs, lambda s: (s.conditioning, s.adapter))
        for block in self.single_transformer_blocks:
            xs = block(xs, streams, mix)
        return streams, xs

    def stream(self, branch: Branch, e: Float[Tensor, "b D"]) -> Stream:
        table = rotary_table(branch.ids, self.config.axes_dims_rope).to(wide(e).dtype.to_complex())
        return Stream({branch.name: branch.tokens.shape[1]}, branch.conditioning, branch.adapter, e, table)

    def tell_grids(self, branches: list[Branch]) -> None:
        """Set the sites' grids; only where controls are, for reading the ids waits for the device."""
        layers = [block.attn for block in (*self.transformer_blocks, *self.single_transformer_blocks)]
        if any(layer.controls for layer in layers):
            extent = lambda ids: tuple(int(n) for n in (ids.amax(0) - ids.amin(0) + 1)[1:])
            grids = {branch.name: extent(branch.ids) for branch in branches if branch.name != "text"}
            for layer in layers:
                layer.grids, layer.grid = grids, grids.get("image")
