"""BERT with the two heads it is pretrained with (Devlin et al. 2019), under the names of transformers' BertForPreTraining.

masked tokens    logits = E LN(gelu(W x)) + b      b n vocab    E: the token embeddings
next sentence    logits = W_s pooled               b 2          0: the second sentence follows the first
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.backbones.bert import Bert, BertConfig
from common.backbones.pretrained import Pretrained


class MaskedTokenHead(nn.Module):
    """E LN(gelu(W x)) + b."""

    def __init__(self, c: BertConfig, embeddings: nn.Parameter):
        super().__init__()
        self.transform = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, c.hidden_size), "LayerNorm": nn.LayerNorm(c.hidden_size, c.layer_norm_eps)})
        self.decoder = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.decoder.weight = embeddings
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n vocab"]:
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x)))) + self.bias


class BertPretraining(Pretrained, nn.Module):
    """The encoder with its pooler, and both heads."""

    config_class = BertConfig
    tiny = "tiny-bert"

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        predictions = MaskedTokenHead(config, self.bert.embeddings.word_embeddings.weight)
        self.cls = nn.ModuleDict({"predictions": predictions, "seq_relationship": nn.Linear(config.hidden_size, 2)})
        self.init_weights()

    def forward(
        self, input_ids: Int[Tensor, "b n"], attention_mask: Int[Tensor, "b n"] | None = None, token_type_ids: Int[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n vocab"]:
        """Logits of the token at each place."""
        return self.words(self.bert(input_ids, attention_mask, token_type_ids))

    def words(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n vocab"]:
        """Logits of tokens from states of the encoder, of all or of some places."""
        return self.cls["predictions"](x)

    def follows(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b 2"]:
        """Logits of whether the second sentence follows the first (class 0), from all states."""
        return self.cls["seq_relationship"](self.bert.pooled(x))

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Old releases load too; some files hold the bias twice."""
        if name.endswith("position_ids") or name == "cls.predictions.decoder.bias":
            return None
        return name.replace(".gamma", ".weight").replace(".beta", ".bias")
