"""LLaVA-1.5 (Liu et al. 2024): a CLIP image tower, a projector and Llama, with the parameter names of the llava-hf files.

    Z = hidden state -2 of the tower, without the class token                                  i p d
    H = W₂ gelu(W₁ Z)                                                                          i p c
    x = E[token], but the rows of H, in order, where the token is <image>                      b n c
    logits = Llama(x)                                                                          b n vocab

The prompt holds one <image> token per patch; to Llama they are tokens like others, causal and with consecutive positions. `Role` says
which tokens of a sequence are system prompt, image, question and answer.
"""

import re
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.backbones.clip import CLIPVision, CLIPVisionConfig
from common.backbones.llama import Cache, Llama, LlamaConfig
from common.backbones.pretrained import Pretrained, accept, read_config

LLAMA_7B = {  # what transformers leaves out of the text part of a file, because they are its defaults
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "eos_token_id": 2,
}


@dataclass
class LlavaConfig:
    """The fields of the published config.json; a part may be given as the json object."""

    text_config: LlamaConfig
    vision_config: CLIPVisionConfig
    image_token_index: int = 32000
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"  # drops the class token; "full" keeps it
    projector_hidden_act: str = "gelu"

    def __post_init__(self):
        if isinstance(self.text_config, dict):
            self.text_config = read_config(LlamaConfig, LLAMA_7B | self.text_config)
        if isinstance(self.vision_config, dict):
            self.vision_config = read_config(CLIPVisionConfig, self.vision_config)
        accept(self, vision_feature_select_strategy=("default", "full"), projector_hidden_act=("gelu",))


class Role(IntEnum):
    """What a token of a sequence is."""

    PADDING = 0
    SYSTEM = 1  # before the first image
    IMAGE = 2
    QUERY = 3  # the rest of the prompt: the question, with what the template puts around it
    OUTPUT = 4  # generated


def up_to(roles: Int[Tensor, "b n"], m: int) -> Int[Tensor, "b m"]:
    """The roles of the m tokens so far; those after the n of the prompt are output."""
    return F.pad(roles, (0, m - roles.shape[1]), value=Role.OUTPUT)


class LlavaProjector(nn.Module):
    """W₂ gelu(W₁ Z)."""

    def __init__(self, c: LlavaConfig):
        super().__init__()
        self.linear_1 = nn.Linear(c.vision_config.hidden_size, c.text_config.hidden_size)
        self.linear_2 = nn.Linear(c.text_config.hidden_size, c.text_config.hidden_size)

    def forward(self, z: Float[Tensor, "i p d"]) -> Float[Tensor, "i p c"]:
        return self.linear_2(F.gelu(self.linear_1(z)))


class Llava(Pretrained, nn.Module):
    """The vision-language model."""

    config_class, tiny = LlavaConfig, "tiny-vlm"

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVision(config.vision_config)
        self.multi_modal_projector = LlavaProjector(config)
        self.language_model = Llama(config.text_config)
        self.init_weights()

    def image_features(self, pixel_values: Float[Tensor, "i c H W"]) -> Float[Tensor, "i p c"]:
        """H."""
        z = self.vision_tower(pixel_values, self.config.vision_feature_layer)
        return self.multi_modal_projector(z[:, 1:] if self.config.vision_feature_select_strategy == "default" else z)

    def embed(self, input_ids: Int[Tensor, "b n"], pixel_values: Float[Tensor, "i c H W"] | None = None) -> Float[Tensor, "b n c"]:
        """x. The images are in the order of their tokens, row by row of the batch."""
        x = self.language_model.embed(input_ids)
        if pixel_values is None:
            return x
        h, image = self.image_features(pixel_values), input_ids == self.config.image_token_index
        if image.sum() != h.shape[0] * h.shape[1]:
            raise ValueError(f"the prompts hold {image.sum()} image tokens, not {h.shape[0]} x {h.shape[1]}: write one per patch of every image")
        return x.masked_scatter(image[..., None], h.to(x.dtype))

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        pixel_values: Float[Tensor, "i c H W"] | None = None,
        attention_mask: Int[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None,
        position_ids: Int[Tensor, "b n"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n vocab"]:
        """Logits of the token after each; the last three arguments as in `LlamaModel.forward`."""
        return self.language_model(self.embed(input_ids, pixel_values), attention_mask, position_ids, cache)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "b n"],
        pixel_values: Float[Tensor, "i c H W"] | None = None,
        attention_mask: Int[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None,
        **sampling,
    ) -> Int[Tensor, "b t"]:
        """The answer's tokens; sampling: max_new_tokens and the other options of `Llama.generate`."""
        return self.language_model.generate(self.embed(input_ids, pixel_values), attention_mask, **sampling)

    def roles(self, input_ids: Int[Tensor, "b n"], attention_mask: Tensor | None = None) -> Int[Tensor, "b n"]:
        """The `Role` of each token of a prompt; `up_to` adds those that were generated since."""
        image = input_ids == self.config.image_token_index
        roles = torch.where(image.cumsum(1) > 0, Role.QUERY, Role.SYSTEM).masked_fill(image, Role.IMAGE)
        return roles if attention_mask is None else roles.masked_fill(~attention_mask.bool(), Role.PADDING)

    @classmethod
    def rename(cls, name: str) -> str | None:
        if name.endswith("position_ids"):
            return None
        for pattern, replacement in NEWER_NAMES:
            name = re.sub(pattern, replacement, name)
        return name


NEWER_NAMES = (  # pattern in the memory and the files of newer versions of transformers -> replacement
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
)
