"""See What You Are Told: Visual Attention Sink in Large Multimodal Models (Kang et al., ICLR 2025, arXiv 2503.03321).

x_j: token j of the residual stream entering layer l. a_ij: weight that query i gives key j in head h of that layer. I_vis: the image's tokens.

    φ(x) = max_{d ∈ D_sink} |x[d]| / √(mean_k x[k]²)                                 sink value                                b n
    I_sink = {j : φ(x_j) ≥ τ},   I_vsink = I_sink ∩ I_vis                            of layer l, found on the prompt           b n
    m_i = Σ_{j ∈ I_vis} a_ij ≥ 0.2,   r_i = Σ_{j ∈ I_vis \\ I_vsink} a_ij / m_i ≥ ρ    image-centric rows of a map: these change  b h n
    Ω_i = p Σ_{j ∈ I_sink} a_ij                                                      the budget, from image and text sinks     b h n
    a'_ij = (1 - p) a_ij                                     j ∈ I_sink                                                        b h n m
            a_ij + Ω_i a_ij / Σ_{k ∈ I_vis \\ I_vsink} a_ik   j ∈ I_vis \\ I_vsink
            a_ij                                             else

D_sink are the channels in which the first token of any text is huge: two of 4096 in Llama-2-7B. φ ≤ √D, and the paper's τ = 20 is 0.3125 √4096.
Queries are the text after the image and all that is generated, layers all but the last. Rows keep their sum. The sinks of a layer are known
before its attention is computed, so that one pass does it all. What a sink adds to the residual stream is a_ij ‖x_j W_OV‖, W_OV = W_V W_O.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.attention import Site, controlled
from common.backbones.llama import Llama

TAU = 20 / math.sqrt(4096)  # τ / √D
RECEIVERS = ("image", "text", "both")

# ---- sinks ------------------------------------------------------------------------------------------------------------------------------


def sink_value(x: Float[Tensor, "*b c"], channels: Sequence[int]) -> Float[Tensor, "*b"]:
    """φ; 1e-6 under the root, as in the authors' code, makes it 0 for x = 0. In float32 at least: squares of sinks overflow half precision."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rms = (x.square().mean(-1) + 1e-6).sqrt()
    return x[..., list(channels)].abs().amax(-1) / rms


class Stream:
    """A control that keeps the residual stream entering each layer."""

    def __init__(self):
        self.states: list[Float[Tensor, "b n c"]] = []

    def hidden(self, site: Site, x: Float[Tensor, "b n c"]) -> None:
        self.states.append(x)


@torch.no_grad()
def first_token(llama: Llama, token: int) -> Float[Tensor, "layers c"]:
    """x_0 from layer 2 on. Under a causal mask the token that begins a text sees itself alone, so that no text need follow."""
    with controlled(llama, Stream()) as stream:
        llama(torch.tensor([[token]], device=llama.lm_head.weight.device))
    return torch.stack(stream.states[2:])[:, 0, 0].float()


def sink_channels(x: Float[Tensor, "layers c"], count: int = 2) -> tuple[int, ...]:
    """D_sink: the channels with the largest |x[d]| / RMS of the first token, mean over its layers."""
    size = (x.abs() / x.square().mean(-1, keepdim=True).sqrt()).mean(0)
    return tuple(size.topk(count).indices.tolist())


# ---- redistribution ---------------------------------------------------------------------------------------------------------------------


def image_centric(
    a: Float[Tensor, "b h n m"],
    sinks: Bool[Tensor, "b 1 1 m"] | Float[Tensor, "b 1 1 m"],
    image: slice,
    *,
    mass: float = 0.2,
    rho: float = 0.5,
    official: bool = False,
) -> Bool[Tensor, "b h n 1"]:
    """Rows with m_i ≥ mass and r_i ≥ ρ.

    official: as the authors' code has it, none where the layer has no image sink, and 1e-6 more per image token in the denominator of 1 - r_i.
    """
    looks, vsinks = a[..., image], sinks[..., image]
    m, on_sinks = looks.sum(-1, keepdim=True), (looks * vsinks).sum(-1, keepdim=True)
    if official:
        return (m >= mass) & (on_sinks <= (1 - rho) * (m + 1e-6 * looks.shape[-1])) & vsinks.any(-1, keepdim=True)
    return (m >= mass) & (on_sinks <= (1 - rho) * m)


def redistribute(
    a: Float[Tensor, "b h n m"],
    rows: Bool[Tensor, "b h n 1"],
    sinks: Bool[Tensor, "b 1 1 m"] | Float[Tensor, "b 1 1 m"],
    receivers: Bool[Tensor, "b 1 1 m"] | Float[Tensor, "b 1 1 m"],
    p: float = 0.6,
) -> Float[Tensor, "b h n m"]:
    """a' in the given rows, a in the others. A row without weight on a receiver stays as it is: the budget would have nowhere to go."""
    taken, base = p * (a * sinks), a * receivers
    budget, total = taken.sum(-1, keepdim=True), base.sum(-1, keepdim=True)  # Ω_i, and what it is shared out in proportion to
    return torch.where(rows & (total > 0), a - taken + budget / total * base, a)


class VAR:
    """Visual attention redistribution, a control of the language model; `redistributing` puts it on the paper's layers.

    image: where the image's tokens lie in the prompts, the same in each. tau: default 0.3125 √D. p: the share of the sinks' weight that moves.
    mass = rho = 0 selects every head. receivers: who gets the budget, the tokens other than sinks of the image, of the text, or of both. A new
    prompt begins with every pass of more than one token. Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        image: slice,
        channels: Sequence[int],
        *,
        tau: float | None = None,
        rho: float = 0.5,
        mass: float = 0.2,
        p: float = 0.6,
        receivers: str = "image",
        official: bool = False,
    ):
        if receivers not in RECEIVERS:
            raise ValueError(f"receivers {receivers!r}: take {', '.join(RECEIVERS)}")
        if not all(0 <= value <= 1 for value in (rho, mass, p)):
            raise ValueError(f"rho = {rho}, mass = {mass} and p = {p} are shares: take values from 0 to 1")
        self.image, self.channels, self.tau, self.p, self.receivers = image, channels, tau, p, receivers
        self.select = {"mass": mass, "rho": rho, "official": official}
        self.sinks: dict[int, Bool[Tensor, "b n"]] = {}  # by layer
        self.masks: dict[int, tuple[Float[Tensor, "b 1 1 n"], Float[Tensor, "b 1 1 n"]]] = {}  # sinks and receivers

    def hidden(self, site: Site, x: Float[Tensor, "b n c"]) -> None:
        """I_sink of a new prompt; what is generated is not tested."""
        if x.shape[1] > 1:
            tau = TAU * math.sqrt(x.shape[-1]) if self.tau is None else self.tau
            self.begin(site.layer, sink_value(x, self.channels) >= tau, x.dtype)

    def begin(self, layer: int, sinks: Bool[Tensor, "b n"], dtype: torch.dtype) -> None:
        """A prompt with these sinks in a layer."""
        kind = torch.full_like(sinks, self.receivers != "image")
        kind[:, self.image] = self.receivers != "text"
        self.sinks[layer] = sinks
        self.masks[layer] = sinks[:, None, None].to(dtype), (kind & ~sinks)[:, None, None].to(dtype)

    def weights(self, site: Site, a: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        n, m = a.shape[2:]
        if m > self.sinks[site.layer].shape[1]:  # room for what is generated: text, and no sinks
            self.begin(site.layer, F.pad(self.sinks[site.layer], (0, m)), a.dtype)
        sinks, receivers = (mask[..., :m] for mask in self.masks[site.layer])
        first = max(0, self.image.stop - (m - n))  # of the rows after the image
        late = a[:, :, first:]
        changed = redistribute(late, image_centric(late, sinks, self.image, **self.select), sinks, receivers, self.p)
        return torch.cat([a[:, :, :first], changed], 2) if first else changed


def redistributing(llama: Llama, var: VAR, official: bool = False):
    """A context in which `var` acts on all layers but the last; official: on those from 2 on, the last too, which the authors' code never skips."""
    last = llama.config.num_hidden_layers - 1
    return controlled(llama, var, where=lambda site: site.layer >= 2 if official else site.layer < last)


# ---- observations -----------------------------------------------------------------------------------------------------------------------


class Observe:
    """A control that describes the image tokens of each prompt, layer by layer.

    phi: φ. attention: a_ij, mean over heads and the queries i after the image. contribution: a_ij ‖x_j W_OV‖, the same mean.
    """

    def __init__(self, llama: Llama, image: slice, channels: Sequence[int]):
        self.llama, self.image, self.channels = llama, image, channels
        self.phi, self.attention, self.contribution = ([] for _ in range(3))

    def hidden(self, site: Site, x: Float[Tensor, "b n c"]) -> None:
        self.phi.append(sink_value(x[:, self.image], self.channels))

    def qkv(self, site: Site, q: Tensor, k: Tensor, v: Float[Tensor, "b h m d"]) -> None:
        w_o = self.llama.model.layers[site.layer].self_attn.o_proj.weight.unflatten(1, (site.heads, -1))
        self.size = torch.einsum("bhmd,chd->bhmc", v[:, :, self.image], w_o).norm(dim=-1)

    def weights(self, site: Site, a: Float[Tensor, "b h n m"]) -> None:
        looks = a[:, :, self.image.stop :, self.image].mean(2)
        self.attention.append(looks.mean(1))
        self.contribution.append((looks * self.size).mean(1))


class KnockOut:
    """A control that forbids the queries after the image to look at some keys: their logits become -∞.

    tokens: which, by layer, of the prompt.
    """

    def __init__(self, image: slice, tokens: Bool[Tensor, "layers b n"]):
        self.image, self.tokens = image, tokens

    def logits(self, site: Site, s: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        n, m = s.shape[2:]
        tokens = self.tokens[site.layer]
        blocked = F.pad(tokens, (0, m - tokens.shape[1]))[:, None, None]
        late = torch.arange(m - n, m, device=s.device)[:, None] >= self.image.stop
        return s.masked_fill(blocked & late, float("-inf"))


# ---- a control experiment ---------------------------------------------------------------------------------------------------------------


class Implant(nn.Module):
    """A control that makes sinks of some image tokens of a model that has none.

        x_j[d] ← x_j[d] + height · RMS(x_j)     d ∈ D_sink, entering layer 0
        s_ij ← s_ij + b                         one b for each layer and head, every query i

    places: which tokens of the prompt, "b k", to be set before each one. shares: what they took of the weight that the queries after the image
    gave to the image in the last prompt, "h" for each layer. b is fitted until that is as much as wanted.
    """

    def __init__(self, llama: Llama, image: slice, channels: Sequence[int], height: float):
        super().__init__()
        self.image, self.channels, self.height = image, tuple(channels), height
        self.places: Int[Tensor, "b k"]
        self.b = nn.Parameter(torch.zeros(llama.config.num_hidden_layers, llama.config.num_attention_heads))

    def at(self, m: int) -> Float[Tensor, "b m"]:
        """1 at the implants among m tokens."""
        return torch.zeros(len(self.places), m, device=self.b.device).scatter(1, self.places, 1.0)

    def hidden(self, site: Site, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"] | None:
        if site.layer > 0 or x.shape[1] == 1:
            return None
        self.shares: list[Float[Tensor, "h"]] = []
        gain = torch.zeros_like(x)
        gain[..., self.channels] = (self.height * x.square().mean(-1).sqrt() * self.at(x.shape[1]))[..., None]
        return x + gain

    def logits(self, site: Site, s: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        return s + self.b[site.layer][:, None, None] * self.at(s.shape[-1])[:, None, None]

    def weights(self, site: Site, a: Float[Tensor, "b h n m"]) -> None:
        if a.shape[2] > 1:
            looks = a[:, :, self.image.stop :, self.image]
            taken = (looks * self.at(self.image.stop)[:, None, None, self.image]).sum(-1)
            self.shares.append((taken / looks.sum(-1)).mean((0, 2)))
