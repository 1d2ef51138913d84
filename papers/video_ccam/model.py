"""Video-CCAM: causal cross-attention masks (Fei et al. 2024, arXiv 2408.14023).

The frames of a video are encoded one by one, M tokens each. One cross-attention turns the T M tokens into N, which the language model reads:

    x_j = encoder(frame t_j),   t_j = ⌈j / M⌉                                            T M c    no sign of time in x
    M_ij = 1 if t_j ≤ ⌈i T / N⌉ else 0                                                   N T M    causal cross-attention mask
    y_i = Σ_j M_ij exp(Q_i K(x_j)ᵀ/√d) V(x_j) / Σ_j M_ij exp(Q_i K(x_j)ᵀ/√d)             N d      a head; Q of the learnt queries q
    h = q + W_o y,   h ← h + W_down(silu(W_gate LN h) · W_up LN h),   z = W LN h         N D
    logits = LLM([text before ; z_1 .. z_N ; text after])

Query i sees the first ⌈i T / N⌉ frames: the queries climb a staircase through the video, the last sees all of it. With an image, T = 1, the mask is
all ones. With τ = t/T, query i averages over τ ≤ i/N, and more frames sample the same average more finely: training on 16 frames serves 96.
Without M the sum does not know the order of its terms.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from timm.layers import SwiGLU
from timm.models import VisionTransformer
from tokenizers import Tokenizer
from torch import Tensor, nn

from common.attention import MultiHeadAttention
from common.backbones.llama import Llama, LlamaConfig
from common.backbones.pretrained import accept, read_config
from common.errors import UserError
from common.layers import sinusoidal
from common.loop import load_named, read_safetensors

PLACEHOLDER = -1  # stands in a prompt where z goes
IGNORED = -100  # label of a token that is not learnt

Tokens = Float[Tensor, "b T M c"]

# ---- the mask ---------------------------------------------------------------------------------------------------------------------------


def last_frames(frames: Int[Tensor, "b"], queries: int) -> Int[Tensor, "b N"]:
    """⌈i T / N⌉ for i = 1..N: how many frames each query sees of videos of T = `frames` frames."""
    i = torch.arange(1, queries + 1, device=frames.device)
    return (i * frames[:, None] + queries - 1) // queries


def frame_mask(last: Int[Tensor, "b N"], longest: int, tokens: int) -> Bool[Tensor, "b N TM"]:
    """t_j ≤ last, for videos padded to `longest` frames of `tokens` tokens. A query sees no more frames than there are: padding is masked."""
    t = torch.arange(1, longest + 1, device=last.device)
    return (t <= last[..., None]).repeat_interleave(tokens, -1)


# ---- the projector ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ProjectorConfig:
    """`projector_config` of a published config.json; the defaults are those of Video-CCAM-7B-v1.2."""

    num_query: int = 1024  # N
    hidden_size: int = 1024
    cross_hidden_size: int = 1152  # c, of the encoder's tokens
    num_heads: int = 16
    num_key_value_heads: int = 16
    intermediate_size: int = 4096
    output_size: int = 3584  # D, of the language model
    layer_norm_eps: float = 1e-5
    dropout: float = 0.1
    hidden_act: str = "swiglu"
    attention_bias: bool = True
    mlp_bias: bool = True

    def __post_init__(self):
        accept(self, hidden_act=("swiglu",), attention_bias=(True,), mlp_bias=(True,))


class CCAMProjector(nn.Module):
    """T M tokens to N. The queries do not attend to each other, so that z_i depends on its own frames alone."""

    def __init__(self, c: ProjectorConfig):
        super().__init__()
        norm = lambda width: nn.LayerNorm(width, c.layer_norm_eps)
        self.query = nn.Parameter(torch.randn(c.num_query, c.hidden_size) * 0.02)
        self.query_norm, self.context_norm = norm(c.hidden_size), norm(c.cross_hidden_size)
        self.attention = MultiHeadAttention(c.hidden_size, c.num_heads, kv_heads=c.num_key_value_heads, context_dim=c.cross_hidden_size)
        self.mlp_norm, self.mlp = norm(c.hidden_size), SwiGLU(c.hidden_size, c.intermediate_size)
        self.output_norm, self.output = norm(c.hidden_size), nn.Linear(c.hidden_size, c.output_size)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tokens, frames: Int[Tensor, "b"]) -> Float[Tensor, "b N D"]:
        """x: encoded frames, padded to the longest video. frames: T of each."""
        q = self.attention.hidden(self.query.expand(len(x), -1, -1))
        mask = frame_mask(self.seen(frames), x.shape[1], x.shape[2])[:, None]
        y = self.attention(self.query_norm(q), self.context_norm(self.marked(x)).flatten(1, 2), mask=mask)
        h = q + self.dropout(y)
        h = h + self.dropout(self.mlp(self.mlp_norm(h)))
        return self.output(self.output_norm(h))

    def seen(self, frames: Int[Tensor, "b"]) -> Int[Tensor, "b N"]:
        """How many frames each query sees."""
        return last_frames(frames, len(self.query))

    def marked(self, x: Tokens) -> Tokens:
        """The tokens with what is added to tell their time: nothing."""
        return x


# ---- what it is compared with -----------------------------------------------------------------------------------------------------------


class NaiveProjector(CCAMProjector):
    """Plain cross-attention: every query sees every frame."""

    def seen(self, frames: Int[Tensor, "b"]) -> Int[Tensor, "b N"]:
        """T."""
        return frames[:, None].expand(-1, len(self.query))


class TimedProjector(NaiveProjector):
    """No mask, but the number of its frame is added to a token, as sinusoids."""

    def marked(self, x: Tokens) -> Tokens:
        """x + s(t)."""
        t = torch.arange(x.shape[1], device=x.device)
        return x + sinusoidal(t, x.shape[-1])[:, None].to(x.dtype)


class PooledProjector(nn.Module):
    """N means of equal stretches of the T M tokens, in their order, and CCAM's MLP: down-sampling, the order kept."""

    def __init__(self, c: ProjectorConfig):
        super().__init__()
        self.queries = c.num_query
        self.input = nn.Linear(c.cross_hidden_size, c.hidden_size)
        self.mlp_norm, self.mlp = nn.LayerNorm(c.hidden_size, c.layer_norm_eps), SwiGLU(c.hidden_size, c.intermediate_size)
        self.output_norm, self.output = nn.LayerNorm(c.hidden_size, c.layer_norm_eps), nn.Linear(c.hidden_size, c.output_size)

    def forward(self, x: Tokens, frames: Int[Tensor, "b"]) -> Float[Tensor, "b N D"]:
        """As CCAMProjector's."""
        pooled = [F.adaptive_avg_pool1d(video[:t].flatten(0, 1).T, self.queries).T for video, t in zip(x, frames, strict=True)]
        h = self.input(torch.stack(pooled))
        h = h + self.mlp(self.mlp_norm(h))
        return self.output(self.output_norm(h))


PROJECTORS = {"ccam": CCAMProjector, "naive": NaiveProjector, "timed": TimedProjector, "pooled": PooledProjector}

# ---- the model --------------------------------------------------------------------------------------------------------------------------


def normalized(video: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Bytes to -1..1."""
    return video.float() / 127.5 - 1


def resized(video: UInt8[Tensor, "T h w 3"], size: int) -> UInt8[Tensor, "T 3 S S"]:
    """Squeezed to a square, bicubic, nothing cut."""
    return F.interpolate(video.permute(0, 3, 1, 2).float(), (size, size), mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)


class PatchEncoder(nn.Module):
    """A small encoder: a token a patch, which knows its place in the frame."""

    def __init__(self, width: int, size: int, patch: int):
        super().__init__()
        self.patches, self.mix = nn.Conv2d(3, width, patch, stride=patch), nn.Conv2d(width, width, 1)
        self.position = nn.Parameter(torch.zeros((size // patch) ** 2, width))

    def forward(self, frames: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n M c"]:
        return rearrange(self.mix(F.gelu(self.patches(frames))), "n c h w -> n (h w) c") + self.position


@dataclass
class SiglipConfig:
    """`vision_config`; the defaults are those of SigLIP SO400M/14 at 384 pixels."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14


class SiglipEncoder(nn.Module):
    """The tokens before the last layer of SigLIP, as timm computes them: that layer is left out."""

    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.vit = VisionTransformer(
            c.image_size, c.patch_size, num_classes=0, global_pool="", embed_dim=c.hidden_size, depth=c.num_hidden_layers - 1,
            num_heads=c.num_attention_heads, mlp_ratio=c.intermediate_size / c.hidden_size, class_token=False, act_layer="gelu_tanh",
            final_norm=False,
        )  # fmt: skip

    def forward(self, frames: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n M c"]:
        return self.vit.forward_features(frames)


class VideoCCAM(nn.Module):
    """Encoder, projector and language model. chunk: frames in the encoder at a time."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, language_model: Llama, chunk: int = 1024):
        super().__init__()
        self.encoder, self.projector, self.language_model, self.chunk = encoder, projector, language_model, chunk

    def encode(self, video: Float[Tensor, "b T 3 H W"], frames: Int[Tensor, "b"]) -> Tokens:
        """x, zero where a shorter video is padded."""
        real = torch.arange(video.shape[1], device=video.device) < frames[:, None]
        encoded = torch.cat([self.encoder(part) for part in video[real].split(self.chunk)])
        return encoded.new_zeros(*real.shape, *encoded.shape[1:]).index_put((real,), encoded)

    def visual(self, video: Float[Tensor, "b T 3 H W"], frames: Int[Tensor, "b"]) -> Float[Tensor, "b N D"]:
        """z."""
        return self.projector(self.encode(video, frames), frames)

    def embed(self, prompt: Int[Tensor, "b n"], z: Float[Tensor, "b N D"]) -> Float[Tensor, "b m D"]:
        """[E[before] ; z ; E[after]], m = n + N - 1. Raises ValueError unless all rows hold one PLACEHOLDER, in the same column."""
        at = _column(prompt)
        before, after = (self.language_model.embed(part) for part in (prompt[:, :at], prompt[:, at + 1 :]))
        return torch.cat([before, z.to(before.dtype), after], 1)

    def forward(self, video: Float[Tensor, "b T 3 H W"], frames: Int[Tensor, "b"], prompt: Int[Tensor, "b n"]) -> Float[Tensor, "b m vocab"]:
        return self.language_model(self.embed(prompt, self.visual(video, frames)))

    def loss(self, video: Float[Tensor, "b T 3 H W"], frames: Int[Tensor, "b"], prompt: Int[Tensor, "b n"], labels: Int[Tensor, "b n"]) -> Tensor:
        """Nats a token whose label is not IGNORED; a label is the token of the prompt at its own place."""
        logits, at = self(video, frames, prompt), _column(prompt)
        behind = logits.shape[1] - (prompt.shape[1] - at - 1)  # where the text after z begins; what is learnt stands there
        return F.cross_entropy(logits[:, behind - 1 : -1].flatten(0, 1), labels[:, at + 1 :].flatten(), ignore_index=IGNORED)

    @torch.inference_mode()
    def answer(self, tokenizer: Tokenizer, video: Float[Tensor, "T 3 H W"], question: str, most: int = 16) -> str:
        """The likeliest words, at most `most` tokens."""
        prompt = torch.tensor([chat(tokenizer, [(question, "")])[0]], device=video.device)
        z = self.visual(video[None], torch.tensor([len(video)], device=video.device))
        return tokenizer.decode(self.language_model.generate(self.embed(prompt, z), max_new_tokens=most)[0].tolist())


def _column(prompt: Int[Tensor, "b n"]) -> int:
    here = prompt == PLACEHOLDER
    column = int(here[0].int().argmax())
    if not here[:, column].all() or here.sum() != len(prompt):
        raise ValueError("every prompt of a batch must hold one PLACEHOLDER, all in the same column")
    return column


# ---- prompts and answers ----------------------------------------------------------------------------------------------------------------


def tokenizer_of(directory: Path) -> Tokenizer:
    """The tokenizer.json of a language model. Raises UserError."""
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer.json: give the directory of the language model with --llm")
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def chat(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of (question, answer) turns in ChatML, the video before the first question, and labels: answers are learnt, with their end.
    An empty answer is left for the model to give."""
    ids, labels = [], []
    for i, (question, answer) in enumerate(turns):
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        asked = encode("<|im_start|>user\n") + [PLACEHOLDER] * (i == 0) + encode(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
        told = encode(f"{answer}<|im_end|>") if answer else []
        ids, labels = ids + asked + told, labels + [IGNORED] * len(asked) + told
    return ids, labels


def choice_question(question: str, candidates: list[str]) -> str:
    """The words around a multiple-choice question."""
    options = "".join(f"({chr(ord('A') + i)}) {text}\n" for i, text in enumerate(candidates))
    return f"Question: {question}\nOptions:\n{options}Answer with the option's letter from the given choices directly."


def is_right(predicted: str, answer: str) -> bool:
    """Whether a free answer means the choice `answer`, such as "(B) a cat", by the rule of the authors' evaluation: their first words, one within
    the other. An article is thereby the letter A."""
    for opening in ("Answer:", "The answer is", "Answer is"):
        predicted = predicted.removeprefix(opening).strip()
    words, wanted = predicted.lower().replace(".", "").split(), answer.lower().split()[0]
    return bool(words) and (words[0] in wanted or wanted in words[0])


def middle_indices(last: int, fps: float, n: int, bound: tuple[float, float] | None = None, first: int = 0) -> list[int]:
    """MVBench's frames: the middles of n stretches of the time `bound` in seconds; `first` and `last` are the numbers of the outermost frames."""
    start, end = bound or (-1e5, 1e5)
    begin, end = max(first, round(start * fps)), min(round(end * fps), last)
    stretch = (end - begin) / n
    return [int(begin + stretch / 2 + round(stretch * k)) for k in range(n)]


# ---- published weights ------------------------------------------------------------------------------------------------------------------

PARTS = {  # of our projector: what the last words of its published name may be. The authors' code of it could not be read.
    "query": r"quer(y|ies)(_tokens?|_embeds?|\.weight)?|latents?",
    "query_norm": r"(q|query)_(layer)?norm|(norm|ln)_q(uery)?|input_layernorm|norm1",
    "context_norm": r"(k|kv|cross|context)_(layer)?norm|(norm|ln)_(k|kv|cross)|norm_?kv",
    "attention.q_proj": r"q_proj|to_q|wq",
    "attention.k_proj": r"k_proj|to_k|wk",
    "attention.v_proj": r"v_proj|to_v|wv",
    "attention.out_proj": r"o_proj|out_proj|to_out(\.0)?|wo",
    "mlp_norm": r"(mlp|ffn)_(layer)?norm|(norm|ln)_(mlp|ffn|2)|post_attention_layernorm|norm2",
    "mlp.fc1_g": r"gate_proj|fc1_g|w1",
    "mlp.fc1_x": r"up_proj|fc1_x|w3",
    "mlp.fc2": r"down_proj|fc2|w2",
    "output_norm": r"(output|out|post|final)_(layer)?norm|(norm|ln)_(out|post|final)|norm3|norm",
    "output": r"output(_proj|_linear|_layer)?|linear|proj|head",
}
LANGUAGE = re.compile(r"(^|\.)(model\.(layers|embed_tokens|norm)|lm_head)\.")  # in the name of a language model's tensor
QWEN = {  # what an absent part of a published config.json means: Qwen2.5-7B
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rope_theta": 1e6, "eos_token_id": 151645,
}  # fmt: skip


def match_projector(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, str]:
    """Our parameter -> the published one of the same shape, but for leading ones, whose name ends as PARTS says.

    Raises UserError, with the table of what was found, unless the two sides pair off.
    """
    found: dict[str, list[str]] = {}
    for name, tensor in ours.items():
        part, _, leaf = name.rpartition(".") if name != "query" else (name, "", "")
        pattern = re.compile(rf"(^|\.)({PARTS[part]}){re.escape('.' + leaf) if leaf else ''}$")
        found[name] = [n for n, t in theirs.items() if pattern.search(n) and _squeezed(t.shape) == tuple(tensor.shape)]
    table = "\n".join(f"  {name} {tuple(ours[name].shape)} <- {', '.join(names) or 'nothing'}" for name, names in found.items())
    left = theirs.keys() - {name for names in found.values() for name in names}
    taken = [names[0] for names in found.values() if len(names) == 1]
    if len(taken) < len(ours) or len(set(taken)) < len(ours) or left:
        shapes = ", ".join(f"{name} {tuple(theirs[name].shape)}" for name in sorted(left)) or "nothing"
        raise UserError(
            f"the projector cannot be matched by shape and name; left over: {shapes}. Mend PARTS in video_ccam/model.py by this table:\n{table}"
        )
    return {name: names[0] for name, names in found.items()}


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[1:] if len(shape) == 3 and shape[0] == 1 else shape)


def siglip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens' part of transformers' SigLIP under timm's names, without the last layer."""
    state = {name.split("vision_model.")[-1]: tensor for name, tensor in state.items()}
    depth = 1 + max((int(match[1]) for name in state if (match := re.match(r"encoder\.layers\.(\d+)\.", name))), default=-1)
    if not depth:
        raise UserError("these weights hold no SigLIP encoder: give a directory of transformers' SigLIP")
    out = {f"vit.patch_embed.proj.{leaf}": state[f"embeddings.patch_embedding.{leaf}"] for leaf in ("weight", "bias")}
    out["vit.pos_embed"] = state["embeddings.position_embedding.weight"][None]
    pairs = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for layer in range(depth - 1):
        for leaf in ("weight", "bias"):
            block = {theirs: state[f"encoder.layers.{layer}.{theirs}.{leaf}"] for theirs in pairs}
            out |= {f"vit.blocks.{layer}.{pairs[theirs]}.{leaf}": tensor for theirs, tensor in block.items()}
            out[f"vit.blocks.{layer}.attn.qkv.{leaf}"] = torch.cat([state[f"encoder.layers.{layer}.self_attn.{p}_proj.{leaf}"] for p in "qkv"])
    return out


def merge_adapter(state: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """W + (α/r) B A for the adapter that peft saved in `directory`, or `state` where there is none."""
    if not (directory / "adapter_model.safetensors").is_file():
        return state
    config, adapter = _json(directory / "adapter_config.json"), read_safetensors(directory / "adapter_model.safetensors")[0]
    state = dict(state)
    for name in (name for name in adapter if name.endswith("lora_A.weight")):
        a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        target = name.removeprefix("base_model.model.").replace("lora_A.", "")
        if target not in state:
            raise UserError(f"{directory} adapts {target}, which the base model lacks: is it the base the adapter was trained on?")
        state[target] = state[target] + (config["lora_alpha"] / config["r"] * b.float() @ a.float()).to(state[target].dtype)
    return state


def load_published(directory: Path, encoder: str | Path = "", llm: str | Path = "") -> VideoCCAM:
    """A Video-CCAM of the hub: v1.1 and v1.2 hold all weights; v1.0 holds projector/ and adapters, for the directories of SigLIP and of the
    language model. Raises UserError.
    """
    if (directory / "projector").is_dir():
        encoder, llm = _bases(encoder, llm)
        config, vision, text = (_json(d / "config.json") for d in (directory / "projector", encoder, llm))
        seen, spoken = (merge_adapter(_tensors(base), directory / f"{name}_adapter") for base, name in ((encoder, "visual_encoder"), (llm, "llm")))
        projector = _tensors(directory / "projector")
    else:
        config, everything = _json(directory / "config.json"), _tensors(directory)
        vision, text = (
            next((config[k] for k in keys if k in config), {}) for keys in (("vision_config", "vision_encoder_config"), ("llm_config", "text_config"))
        )
        seen = {name: t for name, t in everything.items() if "vision_model." in name}
        spoken = {name: t for name, t in everything.items() if LANGUAGE.search(name) and name not in seen}
        projector = {name: t for name, t in everything.items() if name not in seen and name not in spoken}
        config, text = config.get("projector_config", config), QWEN | text
    model = assemble(vision, config, text, seen, spoken, directory)
    pairs = match_projector(model.projector.state_dict(), projector)
    print("\n".join(f"{name} <- {theirs}" for name, theirs in pairs.items()))
    shapes = {name: t.shape for name, t in model.projector.state_dict().items()}
    load_named(model.projector, {name: projector[theirs].reshape(shapes[name]) for name, theirs in pairs.items()}, directory)
    return model.eval()


def load_bases(encoder: str | Path, llm: str | Path) -> VideoCCAM:
    """SigLIP and a language model from their directories, with a new projector of the published size between them."""
    encoder, llm = _bases(encoder, llm)
    return assemble(_json(encoder / "config.json"), {}, _json(llm / "config.json"), _tensors(encoder), _tensors(llm), llm)


def assemble(vision: dict, projector: dict, text: dict, seen: dict[str, Tensor], spoken: dict[str, Tensor], where: Path) -> VideoCCAM:
    """The parts of these configurations, and the weights of the outer two. Llama's form of language models is read, not Phi-3's."""
    vision, text = read_config(SiglipConfig, vision.get("vision_config", vision)), read_config(LlamaConfig, text)
    projector |= {"cross_hidden_size": vision.hidden_size, "output_size": text.hidden_size}
    model = VideoCCAM(SiglipEncoder(vision), CCAMProjector(read_config(ProjectorConfig, projector)), Llama(text), chunk=16)
    spoken = {name[LANGUAGE.search(name).start() :].lstrip("."): t for name, t in spoken.items() if LANGUAGE.search(name)}
    if text.tie_word_embeddings:
        spoken["lm_head.weight"] = spoken["model.embed_tokens.weight"]
    load_named(model.encoder, siglip_names(seen), where)
    load_named(model.language_model, spoken, where)
    return model


def _bases(encoder: str | Path, llm: str | Path) -> tuple[Path, Path]:
    if not encoder or not llm:
        raise UserError(
            "give the directories of the base models: --encoder of SigLIP SO400M/14 at 384 pixels, --llm of Yi-1.5-9B-Chat or Qwen2.5-7B-Instruct"
        )
    return Path(encoder), Path(llm)


def _tensors(directory: Path) -> dict[str, Tensor]:
    """All of a directory's safetensors."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} has no .safetensors files: give the directory that the model was downloaded to")
    return {name: tensor for file in files for name, tensor in read_safetensors(file)[0].items()}


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}: fetch all files of the published model") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid json ({error}): fetch it again") from None
