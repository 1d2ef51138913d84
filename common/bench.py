"""What the possibility of a control costs where there is none: `Attention` beside the same layer written without it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attention import MultiHeadAttention, merge_heads, split_heads
from common.gpu import alternate

SIZES = {"small": (2, 64, 64, 4), "medium": (2, 512, 512, 8)}  # batch, tokens, width, heads


class Plain(nn.Module):
    """Multi-head attention that cannot be controlled."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


def bench() -> dict:
    """Seconds a forward pass, medians measured in turns."""
    found = {}
    for size, (batch, tokens, dim, heads) in SIZES.items():
        controllable, plain, x = MultiHeadAttention(dim, heads), Plain(dim, heads), torch.randn(batch, tokens, dim)
        plain.load_state_dict(controllable.state_dict())
        with torch.inference_mode():
            assert torch.equal(controllable(x), plain(x))
            seconds = alternate({"plain": lambda m=plain, x=x: m(x), "controllable": lambda m=controllable, x=x: m(x)}, repeats=15, seconds=0.1)
        found[size] = seconds | {"ratio": seconds["controllable"] / seconds["plain"]}
    return {"attention_without_control": found}
