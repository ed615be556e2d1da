"""Which workloads are run where, and which provider of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.micro import rows
from benchmarks.micro.attention import DENSE, MASKED, sparse_query_attention
from benchmarks.micro.workload import Workload

ROWS = (
    rows.rms_norm_score,
    rows.rms_norm_select,
    rows.select_tokens,
    rows.select_largest,
    rows.gather_rows,
    rows.gather_add_rms_norm,
    rows.apply_rotary_at,
    rows.apply_rotary_and_cache,
    rows.scatter_rows,
    rows.scatter_add_rows,
    rows.silu_and_mul,
    rows.add_low_rank,
)
# What takes a CPU milliseconds. A GPU gets prompts of a model with 8 billion parameters: see `benchmarks/campaign`.
ROW_SIZES = [(1, 1024, 576)]  # batch, tokens, hidden
ATTENTION_SIZES = [(1, 1024, 9, 3, 64)]  # batch, tokens, heads, kv_heads, head_dim
OURS = ("triton", "torch", "torch.compile")
PEERS = {
    "rms_norm_score": ("Liger-Kernel, no score",),
    "select_tokens": ("torch.topk + sort", "FlagGems topk + sort"),
    "select_largest": ("torch.topk, unordered",),
    "gather_rows": ("torch.gather",),
    "apply_rotary_and_cache": ("rotary, write by index",),
    "scatter_rows": ("torch.scatter_",),
    "scatter_add_rows": ("add, torch.scatter_",),
    "sparse_query_attention": (*DENSE, *MASKED, "FlexAttention"),
}


@dataclass(frozen=True)
class Benchmark:
    """One provider of one workload, which is built when it is run."""

    make: Callable[..., Workload]
    size: tuple[int, ...]
    provider: str

    @property
    def name(self) -> str:
        return f"{self.make.__name__} {'x'.join(map(str, self.size))} {self.provider}"

    def workload(self, device: torch.device) -> Workload:
        return self.make(device, *self.size)


def benchmarks() -> Iterator[Benchmark]:
    """All of them, those of our kernels first, so that a short run has them."""
    sized = [(make, size) for make in ROWS for size in ROW_SIZES]
    sized += [(sparse_query_attention, size) for size in ATTENTION_SIZES]
    made = [
        Benchmark(make, size, provider) for make, size in sized for provider in (*OURS, *PEERS.get(make.__name__, ()))
    ]
    yield from sorted(made, key=lambda b: b.provider != "triton")
