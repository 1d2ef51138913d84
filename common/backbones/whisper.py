"""Whisper (Radford et al. 2022), an encoder-decoder over log-mel frames, with the parameter names of transformers' WhisperForConditionalGeneration.

    encoder   h = gelu(conv₂(gelu(conv₁(mel)))) + P            two frames a state, P fixed sinusoids     b t c
              h ← h + A(LN h);   h ← h + F(LN h)               every layer, then E = LN h
    decoder   h = E_token[y] + P_position                                                               b i c
              h ← h + A(LN h)  causal;   h ← h + A(LN h, E);   h ← h + F(LN h)
              logits = E_tokenᵀ LN h                           tied embedding

    A(x, ctx) = W_o softmax(q kᵀ/√d) v,   q = W_q x,  k = W_k ctx,  v = W_v ctx      the keys alone have no bias
    F(x) = W₂ gelu(W₁ x)

The cross-attention maps P [b h i t] of a pass are what a control with a `weights` stage sees at the sites of kind "cross".
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.attention import Attention, merge_heads, split_heads
from common.backbones.pretrained import Pretrained


@dataclass
class WhisperConfig:
    """The fields of the published config.json; the defaults are openai/whisper-base's."""

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = 512
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    max_source_positions: int = 1500  # encoder states of the 30 s window
    max_target_positions: int = 448


Cache = dict[Attention, tuple[Tensor, Tensor]]  # keys and values by layer; filled and read by `WhisperAttention`


class WhisperAttention(Attention):
    """A(x, ctx). With a cache, self-attention appends its keys and values, cross-attention computes them once."""

    def __init__(self, dim: int, heads: int, kind: str, layer: int):
        super().__init__(heads, kind, layer)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], states: Float[Tensor, "b t c"] | None = None, *, causal: bool = False, cache: Cache | None = None
    ) -> Float[Tensor, "b n c"]:
        q = split_heads(self.q_proj(x), self.heads)
        k, v = self.keys_values(x, states, {} if cache is None else cache)
        o = self.attend(q, k, v, causal=causal)
        return self.output(self.out_proj(merge_heads(o)))

    def keys_values(self, x, states, cache: Cache) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        known = cache.get(self)
        if known and states is not None:
            return known
        context = self.context(x, x if states is None else states)
        kv = [split_heads(proj(context), self.heads) for proj in (self.k_proj, self.v_proj)]
        cache[self] = tuple(torch.cat(pair, 2) for pair in zip(known, kv, strict=True)) if known else tuple(kv)
        return cache[self]


class WhisperEncoderLayer(nn.Module):
    """h ← h + A(LN h); h ← h + F(LN h)."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, layer: int):
        super().__init__()
        self.self_attn = WhisperAttention(dim, heads, "self", layer)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, h: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        h = self.self_attn.hidden(h)
        h = h + self.self_attn(self.self_attn_layer_norm(h))
        return h + self.feed_forward(h)

    def feed_forward(self, h: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.fc2(F.gelu(self.fc1(self.final_layer_norm(h))))


class WhisperDecoderLayer(WhisperEncoderLayer):
    """The same with a causal self-attention, and h ← h + A(LN h, E) in the middle."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, layer: int):
        super().__init__(dim, heads, ffn_dim, layer)
        self.encoder_attn = WhisperAttention(dim, heads, "cross", layer)
        self.encoder_attn_layer_norm = nn.LayerNorm(dim)

    def forward(self, h: Float[Tensor, "b i c"], states: Float[Tensor, "b t c"], cache: Cache | None) -> Float[Tensor, "b i c"]:
        h = self.self_attn.hidden(h)
        h = h + self.self_attn(self.self_attn_layer_norm(h), causal=True, cache=cache)
        h = self.encoder_attn.hidden(h)
        h = h + self.encoder_attn(self.encoder_attn_layer_norm(h), states, cache=cache)
        return h + self.feed_forward(h)


class WhisperEncoder(nn.Module):
    """Log-mel frames to states, two frames a state."""

    def __init__(self, c: WhisperConfig):
        super().__init__()
        self.conv1 = nn.Conv1d(c.num_mel_bins, c.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(c.d_model, c.d_model, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding.from_pretrained(position_table(c.max_source_positions, c.d_model))
        self.layers = nn.ModuleList(WhisperEncoderLayer(c.d_model, c.encoder_attention_heads, c.encoder_ffn_dim, i) for i in range(c.encoder_layers))
        self.layer_norm = nn.LayerNorm(c.d_model)

    def forward(self, input_features: Float[Tensor, "b mel two_t"]) -> Float[Tensor, "b t c"]:
        frames = 2 * self.embed_positions.num_embeddings
        if input_features.shape[-1] != frames:
            raise ValueError(f"Whisper reads exactly {frames} mel frames, not {input_features.shape[-1]}: pad or cut the recording to its window")
        h = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).mT + self.embed_positions.weight
        for layer in self.layers:
            h = layer(h)
        return self.layer_norm(h)


class WhisperDecoder(nn.Module):
    """Tokens and encoder states to final decoder states."""

    def __init__(self, c: WhisperConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.embed_positions = nn.Embedding(c.max_target_positions, c.d_model)
        self.layers = nn.ModuleList(WhisperDecoderLayer(c.d_model, c.decoder_attention_heads, c.decoder_ffn_dim, i) for i in range(c.decoder_layers))
        self.layer_norm = nn.LayerNorm(c.d_model)

    def forward(self, ids: Int[Tensor, "b i"], states: Float[Tensor, "b t c"], cache: Cache | None) -> Float[Tensor, "b i c"]:
        start = cache[self.layers[0].self_attn][0].shape[2] if cache else 0
        stop, limit = start + ids.shape[1], self.embed_positions.num_embeddings
        if stop > limit:
            raise ValueError(f"{stop} tokens exceed the {limit} positions of the decoder")
        h = self.embed_tokens(ids) + self.embed_positions.weight[start:stop]
        for layer in self.layers:
            h = layer(h, states, cache)
        return self.layer_norm(h)


class WhisperForConditionalGeneration(Pretrained, nn.Module):
    """Speech to text: encoder, decoder and the tied projection to logits."""

    config_class = WhisperConfig

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"encoder": WhisperEncoder(config), "decoder": WhisperDecoder(config)})
        self.apply(init_weights)

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Some files hold the tied projection too."""
        return None if name == "proj_out.weight" else name

    def forward(self, input_features: Float[Tensor, "b mel two_t"], decoder_input_ids: Int[Tensor, "b i"]) -> Float[Tensor, "b i vocab"]:
        """Teacher-forced logits of the token after each of `decoder_input_ids`."""
        return self.decode(decoder_input_ids, self.encode(input_features))

    def encode(self, input_features: Float[Tensor, "b mel two_t"]) -> Float[Tensor, "b t c"]:
        """The states E of a batch of recordings."""
        return self.model["encoder"](input_features)

    def decode(self, ids: Int[Tensor, "b i"], states: Float[Tensor, "b t c"], cache: Cache | None = None) -> Float[Tensor, "b i vocab"]:
        """Logits after each of `ids`. Give the same dict as `cache` to every call, at first empty, and only the new ids each time."""
        decoder = self.model["decoder"]
        return F.linear(decoder(ids, states, cache), decoder.embed_tokens.weight)


def position_table(length: int, dim: int) -> Float[Tensor, "t c"]:
    """P of the encoder: sines, then cosines, of wavelengths from 2π to 10000·2π; the last one is included, unlike `layers.sinusoidal`'s."""
    rate = torch.exp(-math.log(10_000) / (dim // 2 - 1) * torch.arange(dim // 2))
    angle = torch.arange(length)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


def init_weights(module: nn.Module) -> None:
    """For training from scratch: N(0, 0.02) weights and zero biases; norms and the fixed table stay."""
    if isinstance(module, nn.Linear | nn.Conv1d) or (isinstance(module, nn.Embedding) and module.weight.requires_grad):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
