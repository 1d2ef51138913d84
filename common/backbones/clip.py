"""CLIP's two towers (Radford et al. 2021), with the parameter names of transformers, and the way to and from those of open_clip.

    image   h₀ = LN([class, W_patch · patches] + P)                                            b 1+n c
    text    h₀ = E[token] + P                                                                  b n c
    both    h ← h + A(LN h);   h ← h + W₂ act(W₁ LN h)          every layer; the text's A is causal
            image feature = W_image LN(h[class]),   text feature = W_text (LN h)[end of text]  b e
            logits = exp(s) · cos(image feature, text feature)

    act is x σ(1.702 x) in OpenAI's models and the exact GELU in LAION's.

A tower returns any of its hidden states: LLaVA reads the image's state -2 without the class token, Stable Diffusion 1 the text's state -1
after the last norm, SD XL the text's state -2 before it.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.attention import MultiHeadAttention
from common.backbones.pretrained import Pretrained, accept, read_config
from common.layers import Mlp

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass
class CLIPVisionConfig:
    """The image tower's part of the published config.json; the defaults are ViT-B/32's, and transformers leaves them out of its files."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # pixels
    patch_size: int = 32
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self):
        accept(self, hidden_act=ACTIVATIONS)


@dataclass
class CLIPTextConfig:
    """The same for the text tower."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    eos_token_id: int = 2  # what old files say of a vocabulary whose end of text is the highest id

    def __post_init__(self):
        accept(self, hidden_act=ACTIVATIONS)


@dataclass
class CLIPConfig:
    """Both towers; a part may be given as the json object."""

    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    projection_dim: int = 512  # e

    def __post_init__(self):
        if isinstance(self.vision_config, dict):
            self.vision_config = read_config(CLIPVisionConfig, self.vision_config)
        if isinstance(self.text_config, dict):
            self.text_config = read_config(CLIPTextConfig, self.text_config)


# ---- the transformer ------------------------------------------------------------------------------------------------------------------


class CLIPEncoderLayer(nn.Module):
    """h ← h + A(LN h); h ← h + MLP(LN h)."""

    def __init__(self, c: CLIPVisionConfig | CLIPTextConfig, layer: int):
        super().__init__()
        self.self_attn = MultiHeadAttention(c.hidden_size, c.num_attention_heads, layer=layer)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = Mlp(c.hidden_size, c.intermediate_size, ACTIVATIONS[c.hidden_act])
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, h: Float[Tensor, "b n c"], causal: bool) -> Float[Tensor, "b n c"]:
        h = self.self_attn.hidden(h)
        h = h + self.self_attn(self.layer_norm1(h), causal=causal)
        return h + self.mlp(self.layer_norm2(h))


class CLIPEncoder(nn.Module):
    """The layers."""

    def __init__(self, c: CLIPVisionConfig | CLIPTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(c, layer) for layer in range(c.num_hidden_layers))

    def forward(self, h: Float[Tensor, "b n c"], state: int, causal: bool) -> Float[Tensor, "b n c"]:
        """Hidden state number `state`: 0 is the input, -1 that of the last layer; deeper layers do not run."""
        for layer in self.layers[: range(len(self.layers) + 1)[state]]:
            h = layer(h, causal)
        return h


# ---- the towers -----------------------------------------------------------------------------------------------------------------------


class CLIPVisionEmbeddings(nn.Module):
    """[class, W_patch · patches] + P."""

    def __init__(self, c: CLIPVisionConfig):
        super().__init__()
        self.image_size = c.image_size
        self.class_embedding = nn.Parameter(torch.randn(c.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + (c.image_size // c.patch_size) ** 2, c.hidden_size)

    def forward(self, pixel_values: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n d"]:
        if pixel_values.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the image is {tuple(pixel_values.shape[2:])}, this tower takes {self.image_size} x {self.image_size} pixels: resize it"
            )
        patches = self.patch_embedding(pixel_values).flatten(2).mT
        return torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1) + self.position_embedding.weight


class CLIPVisionTransformer(nn.Module):
    """The image tower; the class token is the first."""

    def __init__(self, c: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)  # spelt so in the files
        self.encoder = CLIPEncoder(c)
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        for layer in self.encoder.layers:
            layer.self_attn.grid = (c.image_size // c.patch_size, c.image_size // c.patch_size)

    def forward(self, pixel_values: Float[Tensor, "b c H W"], state: int = -1) -> Float[Tensor, "b n d"]:
        """A hidden state: 0 after the first norm, i after layer i, counted from 1; negative from the end. post_layernorm is not applied."""
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)), state, causal=False)

    def pooled(self, pixel_values: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
        """LN(h[class])."""
        return self.post_layernorm(self(pixel_values)[:, 0])


class CLIPTextEmbeddings(nn.Module):
    """E[token] + P."""

    def __init__(self, c: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        n, longest = input_ids.shape[1], self.position_embedding.num_embeddings
        if n > longest:
            raise ValueError(f"the text has {n} tokens, this tower takes {longest}: cut it")
        return self.token_embedding(input_ids) + self.position_embedding.weight[:n]


class CLIPTextTransformer(nn.Module):
    """The text tower. There is no padding mask: what follows the end of text is not seen by it."""

    def __init__(self, c: CLIPTextConfig):
        super().__init__()
        self.eos_token_id = c.eos_token_id
        self.embeddings = CLIPTextEmbeddings(c)
        self.encoder = CLIPEncoder(c)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, input_ids: Int[Tensor, "b n"], state: int = -1) -> Float[Tensor, "b n d"]:
        """A hidden state: 0 the embeddings, i after layer i, counted from 1; negative from the end. final_layer_norm is not applied."""
        return self.encoder(self.embeddings(input_ids), state, causal=True)

    def last(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """LN h: what Stable Diffusion 1 reads."""
        return self.final_layer_norm(self(input_ids))

    def pooled(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """(LN h)[end of text]: at the first of them, or at the highest id."""
        end = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).int()
        return self.last(input_ids)[torch.arange(len(input_ids)), end.argmax(1)]


# ---- the models: one tower, or both ---------------------------------------------------------------------------------------------------


class Tower(Pretrained, nn.Module):
    """A tower alone; it also loads from a file of both."""

    part: str  # "vision" or "text"
    kept: tuple[str, ...]  # what it takes from a file

    @classmethod
    def from_config(cls, config: dict) -> Self:
        return super().from_config(config.get(f"{cls.part}_config", config))

    @classmethod
    def rename(cls, name: str) -> str | None:
        if name.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "final_layer_norm.")):
            name = f"{cls.part}_model.{name}"  # files that transformers 5 wrote
        return name if name.startswith(cls.kept) and not name.endswith("position_ids") else None


class CLIPVision(Tower):
    """The image tower."""

    config_class, part, kept, tiny = CLIPVisionConfig, "vision", ("vision_model.",), "tiny-clip"

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionTransformer(config)
        self.init_weights()

    def forward(self, pixel_values: Float[Tensor, "b c H W"], state: int = -1) -> Float[Tensor, "b n d"]:
        """As `CLIPVisionTransformer.forward`."""
        return self.vision_model(pixel_values, state)


class CLIPVisionWithProjection(CLIPVision):
    """With the image feature, which IP-Adapter reads."""

    kept = ("vision_model.", "visual_projection.")

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def feature(self, pixel_values: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """W_image LN(h[class])."""
        return self.visual_projection(self.vision_model.pooled(pixel_values))


class CLIPText(Tower):
    """The text tower, Stable Diffusion's first text encoder."""

    config_class, part, kept, tiny = CLIPTextConfig, "text", ("text_model.",), "tiny-sd/text_encoder"

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        self.init_weights()

    def forward(self, input_ids: Int[Tensor, "b n"], state: int = -1) -> Float[Tensor, "b n d"]:
        """As `CLIPTextTransformer.forward`: Stable Diffusion XL reads state -2; 1 and 2 read `text_model.last`."""
        return self.text_model(input_ids, state)


class CLIPTextWithProjection(CLIPText):
    """With the text feature: the second text encoder of Stable Diffusion XL."""

    kept, tiny = ("text_model.", "text_projection."), "tiny-clip"

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def feature(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b e"]:
        """W_text (LN h)[end of text]."""
        return self.text_projection(self.text_model.pooled(input_ids))


class CLIP(Pretrained, nn.Module):
    """Both towers."""

    config_class, tiny = CLIPConfig, "tiny-clip"

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = c = config
        self.vision_model, self.text_model = CLIPVisionTransformer(c.vision_config), CLIPTextTransformer(c.text_config)
        self.visual_projection = nn.Linear(c.vision_config.hidden_size, c.projection_dim, bias=False)
        self.text_projection = nn.Linear(c.text_config.hidden_size, c.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # s
        self.init_weights()

    def image_features(self, pixel_values: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """W_image LN(h[class]), not normalised."""
        return self.visual_projection(self.vision_model.pooled(pixel_values))

    def text_features(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b e"]:
        """W_text (LN h)[end of text], not normalised."""
        return self.text_projection(self.text_model.pooled(input_ids))

    def forward(self, pixel_values: Float[Tensor, "i c H W"], input_ids: Int[Tensor, "t n"]) -> Float[Tensor, "i t"]:
        """The logits of every image with every text."""
        image, text = F.normalize(self.image_features(pixel_values), dim=-1), F.normalize(self.text_features(input_ids), dim=-1)
        return self.logit_scale.exp() * image @ text.T

    @classmethod
    def rename(cls, name: str) -> str | None:
        return None if name.endswith("position_ids") else name


# ---- open_clip ------------------------------------------------------------------------------------------------------------------------

OPEN_CLIP_STEMS = {  # its name, or the beginning of it -> ours
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
OPEN_CLIP_LAYER = {".attn.": ".self_attn.", ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict under the names of `CLIP`: its projections are transposed, its q, k and v are one matrix."""
    ours = {}
    for name, tensor in state.items():
        name = translate(name, OPEN_CLIP_STEMS, OPEN_CLIP_LAYER)
        if "in_proj_" in name:
            parts = {letter: name.replace("in_proj_", f"{letter}_proj.") for letter in "qkv"}
            ours |= dict(zip(parts.values(), tensor.chunk(3), strict=True))
        else:
            ours[name] = tensor.T if name.endswith("_projection.weight") else tensor
    return ours


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_open_clip`."""
    stems, layer = ({ours: theirs for theirs, ours in table.items()} for table in (OPEN_CLIP_STEMS, OPEN_CLIP_LAYER))
    theirs = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue  # goes with q
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            name = name.replace(".q_proj.", ".in_proj_")
        elif name.endswith("_projection.weight"):
            tensor = tensor.T
        theirs[translate(name, stems, layer)] = tensor
    return theirs


def translate(name: str, stems: dict[str, str], layer: dict[str, str]) -> str:
    """Replace the stem, then the parts of a layer."""
    for theirs, ours in stems.items():
        if name == theirs or name.startswith(theirs + "."):
            rest = name.removeprefix(theirs)
            for part, replacement in layer.items():
                rest = rest.replace(part, replacement)
            return ours + rest
    raise ValueError(f"{name} belongs to no CLIP of two plain towers")


def open_clip_config(config: dict) -> CLIPConfig:
    """The configuration of a model of open_clip, from its json (`open_clip.get_model_config(name)`)."""
    image, text = config["vision_cfg"], config["text_cfg"]
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    vision_config = CLIPVisionConfig(
        hidden_size=image["width"],
        intermediate_size=int(image["width"] * image.get("mlp_ratio", 4)),
        num_hidden_layers=image["layers"],
        num_attention_heads=image["width"] // image.get("head_width", 64),
        image_size=image["image_size"],
        patch_size=image["patch_size"],
        hidden_act=act,
        projection_dim=config["embed_dim"],
    )
    text_config = CLIPTextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["width"],
        intermediate_size=int(text["width"] * text.get("mlp_ratio", 4)),
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        max_position_embeddings=text["context_length"],
        hidden_act=act,
        projection_dim=config["embed_dim"],
    )
    return CLIPConfig(vision_config, text_config, config["embed_dim"])
