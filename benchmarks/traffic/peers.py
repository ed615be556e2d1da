"""The traffic of other ways to the same result: counted in the interpreter, or counted by hand where nothing runs."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch

from benchmarks.static.pairs import count_pairs, selected_positions
from benchmarks.traffic.cases import HALF, Case
from benchmarks.traffic.counting import bytes_of


class Float(float):
    """A number that a kernel may convert: the interpreter passes Python's own, which have no ``to``."""

    def to(self, _: Any) -> "Float":
        return self


def liger_rms_norm() -> Case:
    """Norm without score. Its minimum is ours without the scores."""

    def build() -> tuple[Callable[[], Any], int, int]:
        from liger_kernel.ops import rms_norm
        from triton import language as tl

        x, weight = torch.ones(256, 4096, dtype=HALF), torch.ones(4096, dtype=HALF)

        def call() -> None:  # the interpreter has no libdevice, from which Liger takes the reciprocal root
            with mock.patch.object(rms_norm, "rsqrt", lambda x: tl.rsqrt(x)):
                rms_norm.rms_norm_forward(x, weight, Float(1e-5), Float(0.0), "llama", None)

        return call, bytes_of(x, weight), bytes_of(x)

    return Case("Liger-Kernel rms_norm", "256 x 4096", build)


def counted_peers() -> Iterator[Case]:
    """Of the installed ones."""
    if find_spec("liger_kernel") is not None:
        yield liger_rms_norm()


def top_k_and_sort(tokens: int) -> dict[str, Any]:
    """``torch.topk`` with indices, ``sort`` of them, int32: the least that the operators' own results make it move."""
    k = tokens // 3
    minimum = 4 * tokens + 4 * (k + 1)
    top_k, sort, cast = 4 * tokens + 12 * k, 8 * k + 16 * k, 8 * k + 4 * k
    return {
        "op": "torch.topk + sort",
        "shape": f"{k:,} of {tokens:,}",
        "launches_at_least": 3,
        "minimum_bytes": minimum,
        "requested_at_least": round((top_k + sort + cast) / minimum, 4),
    }


def attention_peers(tokens: int) -> list[dict[str, Any]]:
    """Executed over needed pairs when a tile holds queries of one head, and when a mask hides what was computed."""
    positions = selected_positions(tokens, tokens // 3)
    needed = sum(position + 1 for position in positions)
    unpacked = count_pairs(positions, block_m=128, block_n=128, from_last=False)
    rows = [
        ("FlexAttention, block mask of 128 x 128", unpacked.executed / needed),
        ("scaled_dot_product_attention with a mask", len(positions) * tokens / needed),
        ("dense causal attention of all tokens, 128 x 128", _dense(tokens) / needed),
    ]
    return [{"op": name, "tokens": tokens, "executed_over_needed": round(ratio, 4)} for name, ratio in rows]


def _dense(tokens: int) -> int:
    return count_pairs(range(tokens), block_m=128, block_n=128, from_last=False).executed
