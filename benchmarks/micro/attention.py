"""The workload of attention: bound by multiplying, so its unit is TFLOP/s of what it has to multiply."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import orthorank_kernels as ops
from benchmarks.micro.workload import LeftOut, Workload, compiled_function, ours, random, thirds
from tests.orthorank_kernels.tools import assert_within_budget

MOST_SCORES = 2**32  # bytes that the reference may take for its scores in float32
DENSE = {
    "SDPA flash, all tokens": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN, all tokens": SDPBackend.CUDNN_ATTENTION,
}
MASKED = {
    "SDPA cuDNN with a mask": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient with a mask": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math with a mask": SDPBackend.MATH,
}
CHECKED = 64  # queries of one key/value head that are compared with float64


def sparse_query_attention(
    device: torch.device, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int
) -> Workload:
    """FLOPs: 4 * head_dim for each query head and each key that its query sees (its own position and all before).

    A third of the tokens have queries; peers that know no positions have those of all tokens, and are paid for them.
    """
    positions, selected, group = thirds(device, batch, tokens), tokens // 3, heads // kv_heads
    q = random(device, batch, selected, heads, head_dim).transpose(1, 2)
    k, v = (random(device, batch, kv_heads, tokens, head_dim) for _ in range(2))
    flops = 4.0 * head_dim * heads * (positions.double() + 1).sum().item()
    providers = ours(device, lambda backend: ops.sparse_query_attention(q, k, v, positions, backend=backend))
    for name in ("torch", "torch.compile"):
        providers[name] = _if_it_fits(4 * batch * heads * selected * tokens, providers[name])

    def masked(backend: SDPBackend) -> Callable[[], Any]:
        mask = torch.arange(tokens, device=device) <= positions[:, None, :, None]
        return forced(backend, device, lambda: sdpa(q, k, v, attn_mask=mask, enable_gqa=group > 1))

    def dense(backend: SDPBackend) -> Callable[[], Any]:
        """It knows no positions, so it takes the queries of all tokens; what is compared are the selected."""
        every = random(device, batch, heads, tokens, head_dim)
        every.scatter_(2, positions.long()[:, None, :, None].expand(-1, heads, -1, head_dim), q)
        return forced(backend, device, lambda: sdpa(every, k, v, is_causal=True, enable_gqa=group > 1))

    def flex() -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return key <= positions[b, query]

        mask = create_block_mask(sees, batch, None, selected, tokens, device=str(device))
        made = compiled_function(flex_attention)
        return lambda: made(q, k, v, block_mask=mask, enable_gqa=group > 1)

    sample = torch.linspace(0, selected - 1, min(CHECKED, selected), device=device).long()

    def part(result: torch.Tensor) -> torch.Tensor:
        if result.shape[2] == tokens:
            return result[:1, :group, positions[0, sample].long()]
        return result[:1, :group, sample]

    def check(result: torch.Tensor) -> None:
        asked = (q[:1, :group, sample], k[:1, :1], v[:1, :1])
        eager, exact = (
            ops.sparse_query_attention(*inputs, positions[:1, sample].contiguous(), backend="torch")
            for inputs in (asked, tuple(t.double() for t in asked))
        )
        assert_within_budget(part(result), eager, exact, q.dtype)

    providers |= {name: partial(dense, backend) for name, backend in DENSE.items()}
    providers |= {name: partial(masked, backend) for name, backend in MASKED.items()} | {"FlexAttention": flex}
    amounts = dict.fromkeys(DENSE, 2.0 * head_dim * heads * batch * tokens * (tokens + 1))
    shape = f"{batch} x {tokens}, {heads}/{kv_heads} heads of {head_dim}"
    return Workload("sparse_query_attention", shape, "TFLOP/s", flops, check, providers, amounts)


def forced(backend: SDPBackend, device: torch.device, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with one backend of SDPA and no other: where that cannot run, it raises."""
    if device.type == "cpu" and backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        raise LeftOut(f"{backend.name} needs a GPU")

    def run() -> Any:
        with sdpa_kernel(backend):
            return call()

    return run


def _if_it_fits(size: int, provider: Callable[[], Callable[[], Any]]) -> Callable[[], Callable[[], Any]]:
    def build() -> Callable[[], Any]:
        if size > 4 * MOST_SCORES:
            raise LeftOut(f"it would hold {size / 2**30:.0f} GiB of scores")
        return provider()

    return build
