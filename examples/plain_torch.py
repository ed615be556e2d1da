"""The kernels in a decoder layer of your own: plain PyTorch, no transformers, a batch of prompts without padding.

    python examples/plain_torch.py

`Block.forward` is an ordinary pre-norm layer. `Block.selected` updates k tokens of each row instead of all; with k of
all tokens it gives what `forward` gives. It runs where the tensors are: PyTorch on a CPU, the Triton kernels on a GPU.
"""

import argparse

if __name__ == "__main__":  # before the imports below, which take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import orthorank_kernels as ok

EPS = 1e-5


class Block(nn.Module):
    """RMSNorm, grouped attention with rotary positions, RMSNorm, SwiGLU."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, width: int):
        super().__init__()
        self.head_dim = hidden // heads
        self.input_norm, self.mlp_norm = (nn.Parameter(torch.ones(hidden)) for _ in range(2))
        self.q, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(hidden, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def heads_of(self, x: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] of [batch, tokens, heads * head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """All tokens: ``h`` [batch, tokens, hidden], the tables [1, tokens, head_dim]."""
        x = rms_norm(h, h.shape[-1:], self.input_norm, EPS)
        q, k = (ok.apply_rotary_at(self.heads_of(y), cos, sin) for y in (self.q(x), self.k(x)))
        attended = scaled_dot_product_attention(q, k, self.heads_of(self.v(x)), is_causal=True, enable_gqa=True)
        h = h + self.o(attended.transpose(1, 2).flatten(2))
        x = rms_norm(h, h.shape[-1:], self.mlp_norm, EPS)
        return h + self.down(silu(self.gate(x)) * self.up(x))

    def selected(self, h: Tensor, cos: Tensor, sin: Tensor, k: int) -> Tensor:
        """The ``k`` tokens of each row that are the most orthogonal to its first one; the others stay as they are."""
        chosen = ok.rms_norm_select(h, self.input_norm, EPS, k)
        x, positions = chosen.normed, chosen.positions  # [batch, tokens, hidden], int32 [batch, k], ascending
        keys, values = ok.apply_rotary_at(self.heads_of(self.k(x)), cos, sin), self.heads_of(self.v(x))
        q = self.heads_of(self.q(ok.gather_rows(x, positions)))
        q = ok.apply_rotary_at(q, cos, sin, positions)
        attended = ok.sparse_query_attention(q, keys, values, positions)  # query i sees keys 0 .. positions[i]
        residual, y = ok.gather_add_rms_norm(
            h, positions, self.o(attended.transpose(1, 2).flatten(2)), self.mlp_norm, EPS
        )
        out = h.clone()  # in a model that needs no state again: h itself
        ok.scatter_add_rows_(out, positions, self.down(ok.silu_and_mul(self.gate(y), self.up(y))), residual)
        return out


def rotary(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, tokens, head_dim], for halves that turn together."""
    angles = torch.arange(tokens)[:, None] / 10_000 ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    tokens, hidden, heads = 96, 64, 4
    layers = nn.ModuleList(Block(hidden, heads, kv_heads=2, width=128) for _ in range(6))
    h, (cos, sin) = torch.randn(2, tokens, hidden), rotary(tokens, hidden // heads)
    k = ok.keep_count(tokens, 1 / 3)
    dense = states = h
    for number, layer in enumerate(layers):
        dense = layer(dense, cos, sin)
        states = layer.selected(states, cos, sin, k) if number in (3, 4) else layer(states, cos, sin)
    print(f"layers 3 and 4 update {k} of {tokens} tokens")
    print(f"states change by {float((states - dense).norm() / dense.norm()):.0%} of their size")
    whole = layers[3].selected(h, cos, sin, tokens)
    torch.testing.assert_close(whole, layers[3](h, cos, sin))
    print("with all tokens selected it is the dense layer")


if __name__ == "__main__":
    main()
