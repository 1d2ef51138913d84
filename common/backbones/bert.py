"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019), with the parameter names of transformers, and two ways to compare sentences.

    x = LN(E[token] + P[position] + T[type])                                                   b n c
    x ← LN(x + W_o A(x));   x ← LN(x + W₂ gelu(W₁ x))               every layer; the norms come last
    A = softmax(q kᵀ/√d) v                                         over the real tokens
    pooled = tanh(W_p x[0])                                                                    b c

    sentence   e = x[0], or the mean of x over the real tokens: sentences meet in cos(e, e')   b c
    cross      logits = W pooled (BERT), W tanh(W_d x[0]) (RoBERTa): both sentences are one input    b labels

RoBERTa counts the positions of real tokens from pad + 1 on and gives padding the position pad.

Dropout acts on the embeddings and on what is added to the residual stream, not on the attention weights; a control with
`weights = lambda self, site, p: F.dropout(p, 0.1)` adds that.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.attention import Attention, merge_heads, split_heads
from common.backbones.pretrained import Pretrained, accept


@dataclass
class BertConfig:
    """The fields of the published config.json, with the defaults transformers gives to absent ones."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    hidden_dropout_prob: float = 0.1
    id2label: dict | None = None  # the labels of a cross-encoder; None: one, a similarity
    model_type: str = "bert"
    hidden_act: str = "gelu"

    def __post_init__(self):
        accept(self, model_type=("bert", "roberta"), hidden_act=("gelu",))


class BertEmbeddings(nn.Module):
    """LN(E[token] + P[position] + T[type])."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.first_position = c.pad_token_id + 1 if c.model_type == "roberta" else 0
        self.pad_token_id = c.pad_token_id
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, input_ids: Int[Tensor, "b n"], token_type_ids: Int[Tensor, "b n"] | None) -> Float[Tensor, "b n c"]:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = self.position_embeddings(self.positions(input_ids))
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + positions + self.token_type_embeddings(types)))

    def positions(self, input_ids: Int[Tensor, "b n"]) -> Int[Tensor, "#b n"]:
        """BERT: 0 ... n-1. RoBERTa: pad + 1 on for the real tokens, pad for padding."""
        n, longest = input_ids.shape[1], self.position_embeddings.num_embeddings - self.first_position
        if n > longest:
            raise ValueError(f"the text has {n} tokens, this model takes {longest}: cut it")
        if self.first_position == 0:
            return torch.arange(n, device=input_ids.device)[None]
        real = (input_ids != self.pad_token_id).long()
        return real.cumsum(1) * real + self.pad_token_id


class BertSelfAttention(Attention):
    """A(x)."""

    def __init__(self, c: BertConfig, layer: int):
        super().__init__(c.num_attention_heads, "self", layer)
        self.query = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(c.hidden_size, c.hidden_size)
        self.value = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b 1 1 n"] | None) -> Float[Tensor, "b n c"]:
        context = self.context(x, x)
        q, k, v = (split_heads(project(y), self.heads) for project, y in ((self.query, x), (self.key, context), (self.value, context)))
        return merge_heads(self.attend(q, k, v, mask=mask))


class BertOutput(nn.Module):
    """W y, and the norm after it was added to the residual stream."""

    def __init__(self, c: BertConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def add(self, x: Float[Tensor, "b n c"], y: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """LN(x + y)."""
        return self.LayerNorm(x + self.dropout(y))


class BertAttention(nn.Module):
    """LN(x + W_o A(x))."""

    def __init__(self, c: BertConfig, layer: int):
        super().__init__()
        self.self = BertSelfAttention(c, layer)
        self.output = BertOutput(c, c.hidden_size)

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b 1 1 n"] | None) -> Float[Tensor, "b n c"]:
        x = self.self.hidden(x)
        y = self.self.output(self.output.dense(self.self(x, mask)))
        return self.output.add(x, y)


class BertLayer(nn.Module):
    """x ← LN(x + W_o A(x)); x ← LN(x + W₂ gelu(W₁ x))."""

    def __init__(self, c: BertConfig, layer: int):
        super().__init__()
        self.attention = BertAttention(c, layer)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, c.intermediate_size)})
        self.output = BertOutput(c, c.intermediate_size)

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b 1 1 n"] | None) -> Float[Tensor, "b n c"]:
        x = self.attention(x, mask)
        return self.output.add(x, self.output.dense(F.gelu(self.intermediate["dense"](x))))


class BertEncoder(Pretrained, nn.Module):
    """Tokens to states, without the pooler: what sentence embeddings need."""

    config_class = BertConfig
    tiny = "tiny-bert"

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(config, layer) for layer in range(config.num_hidden_layers))})
        self.init_weights()

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        attention_mask: Int[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """x of the last layer. attention_mask: 0 where the tokens are padding."""
        padded = attention_mask is not None and not attention_mask.all()
        mask = attention_mask.bool()[:, None, None] if padded else None
        x = self.embeddings(input_ids, token_type_ids)
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        return x

    def embed(
        self, input_ids: Int[Tensor, "b n"], attention_mask: Int[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None, pooling: str = "cls"
    ) -> Float[Tensor, "b c"]:
        """e of sentences: the first token's state ("cls") or the mean over the real tokens ("mean"), not normalised."""
        x = self(input_ids, attention_mask)
        if pooling == "cls":
            return x[:, 0]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Files of other heads and of old releases load too."""
        name = name.removeprefix("bert.").removeprefix("roberta.").replace(".gamma", ".weight").replace(".beta", ".bias")
        return name if name.startswith(("embeddings.", "encoder.")) and not name.endswith("position_ids") else None


class Bert(BertEncoder):
    """With the pooler."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.init_weights()

    def pooled(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        """tanh(W_p x[0]) of the last states."""
        return self.pooler["dense"](x[:, 0]).tanh()

    @classmethod
    def rename(cls, name: str) -> str | None:
        bare = name.removeprefix("bert.").removeprefix("roberta.")
        return bare if bare.startswith("pooler.") else super().rename(name)


class RobertaHead(nn.Module):
    """W tanh(W_d x[0])."""

    def __init__(self, c: BertConfig, labels: int):
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)
        self.out_proj = nn.Linear(c.hidden_size, labels)

    def forward(self, first: Float[Tensor, "b c"]) -> Float[Tensor, "b labels"]:
        return self.out_proj(self.dropout(self.dense(self.dropout(first)).tanh()))


class CrossEncoder(Pretrained, nn.Module):
    """Sequence classification: logits of an input that may hold two sentences.

    BERT: [CLS] a [SEP] b [SEP] with token types 0 and 1. RoBERTa: <s> a </s></s> b </s>, all types 0.
    """

    config_class = BertConfig

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        labels = len(config.id2label or [0])
        if config.model_type == "bert":
            self.bert = Bert(config)
            self.dropout = nn.Dropout(config.hidden_dropout_prob)
            self.classifier = nn.Linear(config.hidden_size, labels)
        else:
            self.roberta = BertEncoder(config)
            self.classifier = RobertaHead(config, labels)
        self.init_weights()

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        attention_mask: Int[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b labels"]:
        """The logits; a similarity in (0, 1) is the sigmoid of the only one."""
        if self.config.model_type == "roberta":
            return self.classifier(self.roberta(input_ids, attention_mask, token_type_ids)[:, 0])
        x = self.bert(input_ids, attention_mask, token_type_ids)
        return self.classifier(self.dropout(self.bert.pooled(x)))

    @classmethod
    def rename(cls, name: str) -> str | None:
        return None if name.endswith("position_ids") or name.startswith("roberta.pooler.") else name
