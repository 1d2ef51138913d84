"""Each backbone beside the library it comes from, on the same weights and threads: seconds of a forward pass, and of a decoding Llama.

Both sizes hold random weights: that of the small checkpoint that ships, and a medium one.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common.backbones import pretrained
from common.backbones.bert import BertEncoder
from common.backbones.clip import CLIP
from common.backbones.flux import FluxTransformer2DModel, image_ids
from common.backbones.llama import Llama
from common.backbones.llava import Llava
from common.backbones.sd_unet import UNet2DConditionModel
from common.backbones.sd_vae import AutoencoderKL
from common.backbones.wan import WanTransformer3DModel
from common.backbones.whisper import WhisperForConditionalGeneration
from common.errors import UserError
from common.gpu import alternate
from common.results import load

NEW_TOKENS = 64  # of the decoding Llama


@dataclass(frozen=True)
class Pair:
    """One of our classes and the one it is compared with."""

    ours: type[nn.Module]
    library: str
    name: str
    medium: dict  # fields of config.json
    inputs: Callable[[object], dict[str, Tensor]]  # arguments of both forward passes, from our config

    def models(self, config: dict, folder: Path) -> tuple[nn.Module, nn.Module]:
        """Theirs with random weights, and ours with the same."""
        cls = getattr(__import__(self.library), self.name)
        theirs = (cls(cls.config_class(**config)) if self.library == "transformers" else cls(**config)).eval()
        theirs.save_pretrained(folder)
        return self.ours.from_pretrained(folder), theirs


def tokens(vocab: int, *shape: int) -> Tensor:
    return torch.randint(10, vocab, shape)


def _llava(c) -> dict[str, Tensor]:
    patches = (c.vision_config.image_size // c.vision_config.patch_size) ** 2
    image = torch.full((2, patches), c.image_token_index)
    words = c.text_config.vocab_size - 1  # the image's own token is either the last or one of the first ten
    ids = torch.cat([tokens(words, 2, 4), image, tokens(words, 2, 12)], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, c.vision_config.image_size, c.vision_config.image_size)}


def _clip(c) -> dict[str, Tensor]:
    size, length = c.vision_config.image_size, c.text_config.max_position_embeddings
    return {"pixel_values": torch.randn(8, 3, size, size), "input_ids": tokens(c.text_config.vocab_size, 8, length)}


def _unet(c) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(2, c.in_channels, 16, 16),
        "timestep": torch.tensor([500, 20]),
        "encoder_hidden_states": torch.randn(2, 24, c.cross_attention_dim),
    }


def _flux(c) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 64, c.in_channels),
        "encoder_hidden_states": torch.randn(2, 12, c.joint_attention_dim),
        "pooled_projections": torch.randn(2, c.pooled_projection_dim),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": image_ids((8, 8)),
        "txt_ids": torch.zeros(12, 3),
    }


def _wan(c) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(1, c.in_channels, 8, 16, 16),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, 5, c.text_dim),
    }


def _whisper(c) -> dict[str, Tensor]:
    return {"input_features": torch.randn(1, c.num_mel_bins, 2 * c.max_source_positions), "decoder_input_ids": tokens(c.vocab_size, 1, 24)}


_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
_VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8, "image_size": 112, "patch_size": 14}
_VAE = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3, "block_out_channels": (32, 64, 64)}

PAIRS = {
    "llama": Pair(
        Llama, "transformers", "LlamaForCausalLM", _LLAMA | {"vocab_size": 8000, "num_key_value_heads": 2},
        lambda c: {"input_ids": tokens(c.vocab_size, 2, 128)},
    ),
    "clip": Pair(
        CLIP, "transformers", "CLIPModel",
        {"vision_config": _VISION,
         "text_config": {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4000, "bos_token_id": 2,
                         "eos_token_id": 3}}, _clip,
    ),
    "llava": Pair(
        Llava, "transformers", "LlavaForConditionalGeneration",
        {"vision_config": _VISION, "text_config": _LLAMA | {"vocab_size": 8000}, "image_token_index": 7999}, _llava,
    ),
    "bert": Pair(
        BertEncoder, "transformers", "BertModel",
        {"vocab_size": 8000, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536},
        lambda c: {"input_ids": tokens(c.vocab_size, 8, 64), "attention_mask": (torch.arange(64) < torch.arange(36, 68, 4)[:, None]).long()},
    ),
    "sd_unet": Pair(
        UNet2DConditionModel, "diffusers", "UNet2DConditionModel",
        _LEVELS | {"block_out_channels": (128, 256, 256), "attention_head_dim": 8, "cross_attention_dim": 256}, _unet,
    ),
    "sd_vae": Pair(AutoencoderKL, "diffusers", "AutoencoderKL", _VAE, lambda c: {"sample": torch.randn(1, 3, 128, 128)}),
    "flux": Pair(
        FluxTransformer2DModel, "diffusers", "FluxTransformer2DModel",
        {"in_channels": 64, "num_layers": 4, "num_single_layers": 8, "attention_head_dim": 64, "num_attention_heads": 8, "joint_attention_dim": 512,
         "pooled_projection_dim": 256, "axes_dims_rope": (16, 24, 24), "guidance_embeds": False}, _flux,
    ),
    "wan": Pair(
        WanTransformer3DModel, "diffusers", "WanTransformer3DModel",
        {"num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "text_dim": 256, "ffn_dim": 1536,
         "num_layers": 6}, _wan,
    ),
    "whisper": Pair(
        WhisperForConditionalGeneration, "transformers", "WhisperForConditionalGeneration",
        {"vocab_size": 4000, "d_model": 256, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
         "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "max_source_positions": 300, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
         "decoder_start_token_id": 2},
        _whisper,
    ),
}  # fmt: skip


def bench() -> dict:
    """{backbone: {size: {"ours", "theirs", "ratio"}}}, medians measured in turns. UserError without the libraries."""
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[reference]'") from None
    found = {}
    for name, pair in PAIRS.items():
        sizes = {"medium": pair.medium}
        shipped = pretrained.CHECKPOINTS / pair.ours.tiny / "config.json"
        if shipped.exists():
            sizes["tiny"] = load(shipped)
        found[name] = {size: _compare(pair, config) for size, config in sizes.items()}
        print(name, found[name], flush=True)
    return found


@torch.inference_mode()
def _compare(pair: Pair, config: dict) -> dict[str, float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pair.models(config, Path(folder))
        inputs = pair.inputs(ours.config)
        runs = {"ours": partial(ours, *inputs.values()), "theirs": partial(theirs, **inputs)}
        found = _seconds(runs)
        if isinstance(ours, Llama):
            prompt = inputs["input_ids"][:, :16]
            decode = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            mask = torch.ones_like(prompt)
            seconds = _seconds(
                {
                    "ours": lambda: ours.generate(prompt, mask, max_new_tokens=NEW_TOKENS),
                    "theirs": lambda: theirs.generate(prompt, attention_mask=mask, min_new_tokens=NEW_TOKENS, pad_token_id=0, **decode),
                },
                repeats=15,
            )
            found |= {f"decoding, {who}, tokens/s": len(prompt) * NEW_TOKENS / seconds[who] for who in ("ours", "theirs")}
            found["decoding ratio"] = seconds["ratio"]
    return found


def _seconds(runs: dict[str, Callable[[], object]], repeats: int = 75) -> dict[str, float]:
    """Many short turns, for on a shared machine the time of the same operations scatters by a tenth."""
    seconds = alternate(runs, repeats, seconds=0.05)
    return seconds | {"ratio": seconds["ours"] / seconds["theirs"]}
