"""Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024) and Qwen2, with the parameter names of transformers' *ForCausalLM.

    x = E[token]                                                                               b n c
    x ← x + W_o A(N x);   x ← x + W_down(silu(W_gate N x) · W_up N x)        every layer
    logits = W_head N x                                                                        b n vocab

    N x = w · x / √(mean x² + ε)
    A   = softmax(q kᵀ/√d, causal) v,   q = R_p W_q x,  k = R_p W_k x,  v = W_v x              q b h n d,  k and v b kv n d
    R_p rotates the planes (i, i + d/2) of a head by p · f_i,   f_i = θ^(-2i/d)                p: position of the token
    Llama 3.1 and later:  f ← (1-s) f/factor + s f,   s = clamp((L₀ f/2π - low)/(high - low), 0, 1)

kv < h key/value heads serve groups of query heads. Qwen2 has biases on q, k and v. The head may be tied to E.

Generation keeps the rotated keys and the values of every layer in a `Cache`. A control may drop tokens: if its `hidden` stage returns a
shorter sequence, the tokens that remain are numbered anew from there on, and the caches of the deeper layers are shorter.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.attention import Attention, causal_mask, merge_heads, split_heads
from common.backbones.pretrained import Pretrained, accept
from common.layers import GatedMlp, RMSNorm, frequencies, rotate_half

Rotation = tuple[Float[Tensor, "#b 1 n d"], Float[Tensor, "#b 1 n d"]]  # cos and sin of p · f


@dataclass
class LlamaConfig:
    """The fields of the published config.json, with the defaults transformers gives to absent ones."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None  # the newer spelling of the two above
    attention_bias: bool = False  # on q, k, v and o
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None
    model_type: str = "llama"
    hidden_act: str = "silu"
    use_sliding_window: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rope = {"rope_theta": self.rope_theta} | (self.rope_scaling or {}) | (self.rope_parameters or {})
        self.rope_type = self.rope.get("rope_type") or self.rope.get("type") or "default"
        ends = self.eos_token_id
        self.end_tokens = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        accept(self, model_type=("llama", "qwen2"), hidden_act=("silu",), use_sliding_window=(False,), rope_type=("default", "llama3"))


def rope_frequencies(c: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "d"]:
    """f: Llama 3.1 divides those that turn less than `low` times over the L₀ positions of its first training by `factor`."""
    f = frequencies(c.head_dim, c.rope["rope_theta"], dtype=dtype, device=device)
    if c.rope_type == "default":
        return f
    low, high = c.rope["low_freq_factor"], c.rope["high_freq_factor"]
    turns = c.rope["original_max_position_embeddings"] * f / (2 * torch.pi)
    s = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - s) * f / c.rope["factor"] + s * f


class Cache:
    """What later tokens need of earlier ones: each layer's rotated keys and values [b kv m d], and which tokens are padding."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.real: Bool[Tensor, "b m"] | None = None  # of the first layer's tokens; None: all

    def length(self, layer: int = 0) -> int:
        """Tokens that a layer holds."""
        return self.layers[layer][0].shape[2] if layer < len(self.layers) else 0

    def extend(self, layer: int, k: Float[Tensor, "b kv n d"], v: Float[Tensor, "b kv n d"]) -> tuple[Tensor, Tensor]:
        """Append to a layer; returns all its keys and values."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            self.layers[layer] = tuple(torch.cat(pair, 2) for pair in zip(self.layers[layer], (k, v), strict=True))
        return self.layers[layer]

    def mark(self, x: Float[Tensor, "b n c"], attention_mask: Tensor | None) -> Bool[Tensor, "b m"] | None:
        """Append to `real`, and return it; the new tokens are x."""
        if attention_mask is not None and attention_mask.shape != x.shape[:2]:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, not {tuple(x.shape[:2])}: it covers the new tokens, no cached ones")
        if attention_mask is None or attention_mask.all():
            if self.real is None:
                return None
            attention_mask = torch.ones(x.shape[:2], device=x.device)
        new = attention_mask.bool()
        past = new.new_ones(len(new), self.length()) if self.real is None else self.real
        self.real = torch.cat([past, new], 1)
        return self.real


class Forgetful(Cache):
    """The cache of a pass that nothing follows: keeps no keys and values."""

    def extend(self, layer: int, k: Float[Tensor, "b kv n d"], v: Float[Tensor, "b kv n d"]) -> tuple[Tensor, Tensor]:
        return k, v


class LlamaAttention(Attention):
    """W_o A(x)."""

    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__(c.num_attention_heads, "self", layer)
        self.kv_heads = c.num_key_value_heads
        bias = c.attention_bias or c.model_type == "qwen2"
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Float[Tensor, "b n c"], rotation: Rotation, mask: Bool[Tensor, "b 1 n m"] | None, cache: Cache) -> Float[Tensor, "b n c"]:
        context = self.context(x, x)
        q = rotate_half(split_heads(self.q_proj(x), self.heads), *rotation)
        k = rotate_half(split_heads(self.k_proj(context), self.kv_heads), *rotation)
        v = split_heads(self.v_proj(context), self.kv_heads)
        k, v = cache.extend(self.layer, k, v)
        o = self.attend(q, k, v, mask=mask, causal=mask is None)
        return self.output(self.o_proj(merge_heads(o)))


class LlamaDecoderLayer(nn.Module):
    """x ← x + W_o A(N x); x ← x + MLP(N x)."""

    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = LlamaAttention(c, layer)
        self.mlp = GatedMlp(c.hidden_size, c.intermediate_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Float[Tensor, "b n c"], rotation: Rotation, mask: Bool[Tensor, "b 1 n m"] | None, cache: Cache) -> Float[Tensor, "b n c"]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """From embeddings to the normed states that the head reads."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        attention_mask: Int[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None,
        position_ids: Int[Tensor, "b n"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """x: embeddings of the new tokens. attention_mask: 0 where they are padding. position_ids: default, the number of real tokens
        before. cache: holds the tokens of earlier calls, and then the new ones. Where tokens are dropped, padding must be on the left.
        """
        cache = Forgetful() if cache is None else cache
        past, real, seen = cache.length(), cache.mark(x, attention_mask), None
        positions = self.positions(x, past, real) if position_ids is None else position_ids
        for i, layer in enumerate(self.layers):
            x = layer.self_attn.hidden(x)
            extent = n, m = x.shape[1], cache.length(i) + x.shape[1]
            if extent != seen:  # in the first layer, and after a control has dropped tokens
                rotation = self.rotation(positions[:, :n] - (past + n - m), x.dtype)
                mask = None if real is None else real[:, None, None, :m] & causal_mask(torch.arange(m - n, m, device=x.device), m)
                seen = extent
            x = layer(x, rotation, mask, cache)
        return self.norm(x)

    def positions(self, x: Float[Tensor, "b n c"], past: int, real: Bool[Tensor, "b m"] | None) -> Int[Tensor, "#b n"]:
        """p of the new tokens: how many real ones come before."""
        if real is None:
            return torch.arange(past, past + x.shape[1], device=x.device)[None]
        return (real.cumsum(1)[:, past:] - 1).clamp(min=0)

    def rotation(self, positions: Int[Tensor, "#b n"], dtype: torch.dtype) -> Rotation:
        """cos and sin of p · f, as `rotate_half` takes them; computed in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        angle = positions[:, None, :, None] * rope_frequencies(self.config, wide, positions.device)
        return angle.cos().to(dtype), angle.sin().to(dtype)


class Llama(Pretrained, nn.Module):
    """The language model."""

    config_class = LlamaConfig
    tiny = "tiny-lm"

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    def forward(
        self,
        tokens: Int[Tensor, "b n"] | Float[Tensor, "b n c"],
        attention_mask: Int[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None,
        position_ids: Int[Tensor, "b n"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n vocab"]:
        """Logits of the token after each. tokens: ids or their embeddings; the rest as in `LlamaModel.forward`."""
        return self.lm_head(self.model(self.embed(tokens), attention_mask, position_ids, cache))

    def embed(self, tokens: Int[Tensor, "b n"] | Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """E[token]; embeddings pass through."""
        return tokens if tokens.is_floating_point() else self.model.embed_tokens(tokens)

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "b n"] | Float[Tensor, "b n c"],
        attention_mask: Int[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b t"]:
        """The tokens that follow, t <= max_new_tokens: the likeliest at temperature 0, else drawn from softmax(logits / temperature).

        Prompts of different lengths are padded on the left. A row that has ended repeats eos; all having ended, generation stops.
        """
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("generate continues the last token of each row: pad prompts on the left")
        ends = torch.tensor(self.config.end_tokens, dtype=torch.long, device=tokens.device)
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        cache, new = Cache(), []
        while len(new) < max_new_tokens and not ended.all():
            logits = self.lm_head(self.model(self.embed(tokens), attention_mask, cache=cache)[:, -1])
            token = pick(logits, temperature, generator)
            if len(ends):
                token = torch.where(ended, ends[0], token)
                ended |= torch.isin(token, ends)
            new.append(token)
            tokens, attention_mask = token[:, None], None
        return torch.stack(new, 1)


def pick(logits: Float[Tensor, "b vocab"], temperature: float, generator: torch.Generator | None) -> Int[Tensor, "b"]:
    """One token a row."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
