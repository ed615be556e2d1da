"""The workload of attention: bound by multiplying, so its unit is TFLOP/s of what it has to multiply."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

import orthorank_kernels as ops
from benchmarks.micro.workload import LeftOut, Workload, needs, ours, random, thirds
from tests.kernels.tools import assert_within_budget

MOST_SCORES = 2**32  # bytes that the reference may take for its scores in float32
CHECKED = 64  # queries of one key/value head that are compared with float64


def sparse_query_attention(
    device: torch.device, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int
) -> Workload:
    """FLOPs: 4 * head_dim for each query head and each key that its query sees (its own position and all before)."""
    positions, selected, group = thirds(device, batch, tokens), tokens // 3, heads // kv_heads
    q = random(device, batch, selected, heads, head_dim).transpose(1, 2)
    k, v = (random(device, batch, kv_heads, tokens, head_dim) for _ in range(2))
    flops = 4.0 * head_dim * heads * (positions.double() + 1).sum().item()
    providers = ours(device, lambda backend: ops.sparse_query_attention(q, k, v, positions, backend=backend))
    for name in ("reference", "torch.compile"):
        providers[name] = _if_it_fits(4 * batch * heads * selected * tokens, providers[name])

    def visible() -> torch.Tensor:
        return torch.arange(tokens, device=device) <= positions[:, None, :, None]

    def masked() -> Callable[[], Any]:
        mask = visible()
        return lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def flex() -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return key <= positions[b, query]

        mask = create_block_mask(sees, batch, None, selected, tokens, device=str(device))
        made = torch.compile(flex_attention, dynamic=False)
        return lambda: made(q, k, v, block_mask=mask, enable_gqa=group > 1)

    def flash() -> Callable[[], Any]:
        """Dense: it knows no positions, so it takes the queries of all tokens; what is compared are the selected."""
        needs("flash_attn", device, "flash-attn")
        from flash_attn import flash_attn_func

        every = random(device, batch, tokens, heads, head_dim)
        every.scatter_(1, positions.long()[..., None, None].expand(-1, -1, heads, head_dim), q.transpose(1, 2))
        keys, values = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        return lambda: flash_attn_func(every, keys, values, causal=True)

    sample = torch.linspace(0, selected - 1, min(CHECKED, selected), device=device).long()

    def part(result: torch.Tensor) -> torch.Tensor:
        if result.shape[1] == tokens and result.shape[2] == heads:  # of all tokens, from flash-attn
            rows = positions.long()[:1, sample, None, None].expand(-1, -1, heads, head_dim)
            return result[:1].gather(1, rows).transpose(1, 2)[:, :group]
        return result[:1, :group, sample]

    def check(result: torch.Tensor) -> None:
        asked = (q[:1, :group, sample], k[:1, :1], v[:1, :1])
        eager, exact = (
            ops.sparse_query_attention(*inputs, positions[:1, sample].contiguous(), backend="reference")
            for inputs in (asked, tuple(t.double() for t in asked))
        )
        assert_within_budget(part(result), eager, exact, q.dtype)

    providers |= {"SDPA with a mask": masked, "FlexAttention": flex, "flash-attn, all tokens": flash}
    shape = f"{batch} x {selected} of {tokens}, {heads}/{kv_heads} heads of {head_dim}"
    return Workload("sparse_query_attention", shape, "TFLOP/s", flops, check, providers)


def _if_it_fits(size: int, provider: Callable[[], Callable[[], Any]]) -> Callable[[], Callable[[], Any]]:
    def build() -> Callable[[], Any]:
        if size > 4 * MOST_SCORES:
            raise LeftOut(f"it would hold {size / 2**30:.0f} GiB of scores")
        return provider()

    return build
