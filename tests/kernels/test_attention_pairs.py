"""Query-key pairs that the attention kernel computes over those that somebody needs, from the launch settings alone.

A tile of BLOCK_M rows computes whole blocks of BLOCK_N keys up to its last query's position, so it computes pairs that
causality rules out, and rows past the first query or the group's last head compute for nobody.
"""

from dataclasses import dataclass

import pytest
import torch

from orthorank_kernels.dispatch import interpreting
from orthorank_kernels.triton import attention, configs

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass
class Pairs:
    """For one key/value head of one sequence."""

    executed: int = 0
    masked: int = 0  # of the executed, those in blocks with a mask
    needed: int = 0


def pairs(positions: list[int], group: int, block_m: int, block_n: int, pack: int) -> Pairs:
    """As `visible_keys` and `tile_rows` lay them out, without a window."""
    queries, head_tiles = block_m // pack, -(-group // pack)
    count = Pairs(needed=group * sum(p + 1 for p in positions))
    for end in range(len(positions), 0, -queries):
        low, high = positions[max(0, end - queries)], positions[end - 1]
        unmasked, every = (low + 1) // block_n, -(-(high + 1) // block_n)
        count.executed += head_tiles * block_m * block_n * every
        count.masked += head_tiles * block_m * block_n * (every - unmasked)
    return count


def of_settings(selected: int, keys: int, dim: int, group: int, target: str) -> Pairs:
    constexprs, *_ = configs.launch_settings(dim, group, torch.bfloat16, target, selected)
    positions = [i * keys // selected for i in range(selected)]
    return pairs(positions, group, *(constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "PACK")))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", [64, 128])
def test_little_is_computed_in_vain(dim: int, target: str) -> None:
    short, long = of_settings(682, 2048, dim, 4, target), of_settings(10922, 32768, dim, 4, target)
    assert short.executed <= 1.15 * short.needed, short.executed / short.needed
    assert short.masked <= 0.15 * short.executed, short.masked / short.executed
    assert long.executed <= 1.01 * long.needed, long.executed / long.needed


def test_the_first_tile_is_the_one_that_is_not_full() -> None:
    """Queries that fill their tiles from the first one on cost 6 % more at this length: the rows that nobody needs
    would stand where the keys are many."""
    positions = [3 * i for i in range(682)]
    backwards = pairs(positions, 4, 128, 128, 4)
    forwards = sum(128 * 128 * -(-(positions[min(first + 32, 682) - 1] + 1) // 128) for first in range(0, 682, 32))
    assert backwards.executed < 0.95 * forwards


@pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize(("selected", "group"), [(37, 4), (64, 1), (41, 3)])
def test_the_kernel_computes_what_the_model_says(selected: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    builder, computed = interpreter.interpreter_builder, 0
    dot = builder.create_dot

    def counted(a, b, *rest):
        nonlocal computed
        computed += a.data.shape[0] * b.data.shape[1] if b.data.shape[0] == 16 else 0  # q k^T, of head_dim 16
        return dot(a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", counted)
    monkeypatch.setattr(configs, "splits", lambda *_: 1)
    positions = torch.randperm(150, generator=torch.Generator().manual_seed(selected))[:selected].sort().values
    q, k = torch.zeros(1, group, selected, 16), torch.zeros(1, 1, 150, 16)
    attention.sparse_query_attention(q, k, k, positions.int()[None], 1.0, None, None, 0, None, None, False)
    constexprs, *_ = configs.launch_settings(16, group, torch.float32, "interpreter", selected)
    assert constexprs["BLOCK_N"] != 16, "or the second product would be counted too"
    expected = pairs(positions.tolist(), group, *(constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "PACK")))
    assert computed == expected.executed
