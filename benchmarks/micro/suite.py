"""Which workloads are run where, and which provider of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.micro import rows
from benchmarks.micro.attention import sparse_query_attention
from benchmarks.micro.workload import Workload

ROWS = (
    rows.rms_norm_score,
    rows.rms_norm_select,
    rows.select_tokens,
    rows.gather_rows,
    rows.gather_add_rms_norm,
    rows.apply_rotary_at,
    rows.scatter_rows,
    rows.scatter_add_rows,
    rows.silu_and_mul,
)
# batch, tokens, hidden: a CPU gets what takes it milliseconds, a GPU prompts of a model with 8 billion parameters.
ROW_SIZES = {"cpu": [(1, 1024, 576)], "cuda": [(16, 2048, 4096), (1, 32768, 4096)]}
# batch, tokens, heads, kv_heads, head_dim
ATTENTION_SIZES = {
    "cpu": [(1, 1024, 9, 3, 64)],
    "cuda": [(8, 2048, 32, 8, 128), (1, 32768, 32, 8, 128), (8, 2048, 32, 8, 64), (1, 32768, 32, 8, 64)],
}
OURS = ("triton", "reference", "torch.compile")
PEERS = {
    "rms_norm_score": ("Liger-Kernel, no score",),
    "select_tokens": ("torch.topk + sort", "FlagGems topk + sort"),
    "gather_rows": ("torch.gather",),
    "scatter_rows": ("torch.scatter_",),
    "scatter_add_rows": ("add, torch.scatter_",),
    "sparse_query_attention": ("SDPA with a mask", "FlexAttention", "flash-attn, all tokens"),
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


def benchmarks(device: torch.device) -> Iterator[Benchmark]:
    """All of them, those of our kernels first, so that a short run has them."""
    sized = [(make, size) for make in ROWS for size in ROW_SIZES[device.type]]
    sized += [(sparse_query_attention, size) for size in ATTENTION_SIZES[device.type]]
    made = [
        Benchmark(make, size, provider) for make, size in sized for provider in (*OURS, *PEERS.get(make.__name__, ()))
    ]
    yield from sorted(made, key=lambda b: b.provider != "triton")
