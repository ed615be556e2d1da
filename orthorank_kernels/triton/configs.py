"""Launch settings of the attention kernel, and what they depend on: the GPU and what its hardware can describe.

The tiles themselves are data: `configs/sparse_query_attention.*.json`, read by `orthorank_kernels.settings.lookup`.
Chosen without a GPU: 128 rows halve the traffic of K and V against 64, and 8 warps hold them without spilling; the
bound is shared memory (99 KiB on "ampere-small") or registers. Float32 has no tensor cores here (ieee products): larger
tiles spill in the loop.

Functions of shapes, dtype and target, so that a test can compile exactly what would be launched.
"""

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from orthorank_kernels import launch_notes
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.settings.lookup import family

_LARGEST_PACK = 16  # heads in one tile; a group of 71 would leave 57 of 128 rows idle, in tiles of 15 it leaves 8
CACHED_BYTES = 32 << 20  # of keys and values: what the L2 of an A100 or H100 holds beside what passes through it
MOST_TOGETHER = 2**20  # packed sequences
FEW_ROWS = (16, 64)  # queries times heads for which there are settings of their own


def launch_settings(
    head_dim: int, group: int, dtype: torch.dtype, target: str, queries: int | None = None
) -> tuple[dict[str, int | bool], int, int]:
    """Settings of the attention kernel: (constexprs, num_warps, num_stages).

    Args:
        head_dim: 1 to 256; group: query heads for each key/value head; dtype: of q, k and v.
        target: ``target_of(device)``.
        queries: of a batch row or sequence, on average; None: many.
    """
    tile = _settings.look_up("sparse_query_attention", attention_kind(head_dim, group, dtype, queries), target)
    head_tiles = cdiv(group, min(_LARGEST_PACK, tile["block_m"]))
    constexprs = {
        "GROUP": group,
        "PACK": cdiv(group, head_tiles),
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "BLOCK_M": tile["block_m"],
        "BLOCK_N": tile["block_n"],
        "TMA": family(target) in ("hopper", "blackwell") and dtype.itemsize == 2,
    }
    return constexprs, tile["num_warps"], tile["num_stages"]


def attention_kind(head_dim: int, group: int, dtype: torch.dtype, queries: int | None = None) -> str:
    """The kind of problem, as the files of settings name it: by dtype, head_dim, and whether a tile would be full.

    >>> attention_kind(80, 4, torch.bfloat16), attention_kind(80, 4, torch.bfloat16, queries=3)
    ('16-bit, head_dim 128', '16-bit, head_dim 128, 16 rows')
    """
    kind = f"{8 * dtype.itemsize}-bit, head_dim {max(64, next_power_of_2(head_dim))}"
    if queries is not None:
        rows = queries * min(group, _LARGEST_PACK)
        for few in FEW_ROWS:
            if rows <= few:
                return f"{kind}, {few} rows"
    return kind


def launch(kernel: Any, grid: tuple[int, ...], on: torch.Tensor, **arguments: Any) -> None:
    """``kernel[grid](**arguments)`` on the device of ``on``, which the call's launch plan takes note of."""
    with torch.cuda.device_of(on):
        launch_notes.launch(kernel, grid, arguments)


def scratch(on: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, zeros: bool = False) -> torch.Tensor:
    """New memory that a launch needs beside its results, which the call's launch plan takes note of."""
    made = on.new_zeros(shape, dtype=dtype) if zeros else on.new_empty(shape, dtype=dtype)
    launch_notes.note_scratch(made, zeros)
    return made


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up. Triton's own costs the host two microseconds, and so does its next power of two.

    >>> cdiv(7, 2)
    4
    """
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, which is above 0.

    >>> next_power_of_2(5), next_power_of_2(8)
    (8, 8)
    """
    return 1 << (n - 1).bit_length()


def tiles(queries: int, queries_per_tile: int, n_seqs: int, *, packed: bool) -> int:
    """Tiles of one batch row, or at most so many of all packed sequences and what lies past the last of them.

    >>> tiles(100, 32, 0, packed=False), tiles(100, 32, 5, packed=True)
    (4, 9)
    """
    return queries // queries_per_tile + n_seqs + 1 if packed else cdiv(queries, queries_per_tile)


def together(head_tiles: int, lanes: int, n_seqs: int, head_bytes: int) -> tuple[int, int]:
    """How many lanes, and of each how many packed sequences, have their tiles in turns: those that the L2 cache holds.

    No more sequences than `MOST_TOGETHER`: a program looks at 256 groups at a time, whose numbers must fit 32 bits.

    Args:
        head_tiles: lanes of one key/value head; lanes: in all; head_bytes: keys and values of one such head.

    >>> together(1, 64, 0, 2**20), together(1, 64, 0, 2**26), together(2, 64, 8, 2**26)
    ((32, 1), (1, 1), (2, 4))
    >>> together(1, 64, 2**25, 1)[1] * 256 < 2**31
    True
    """
    heads = CACHED_BYTES // max(1, head_bytes)
    seqs = min(n_seqs, n_seqs * CACHED_BYTES // max(1, head_bytes), MOST_TOGETHER)
    return min(lanes, max(1, heads) * head_tiles), max(1, seqs)


def splits(programs: int, keys: int, block_m: int, block_n: int, device: torch.device) -> int:
    """How many programs share the keys of a tile: at least two where programs would leave a third of the GPU idle, and
    as many as make one wave, each with at least four blocks of keys.

    Args:
        programs: without splits; keys: of the longest sequence.
    """
    wave = _multiprocessors(device) * (1 if block_m > FEW_ROWS[-1] else 2)
    if 3 * programs > 2 * wave:
        return 1
    return max(1, min(max(2, wave // programs), keys // (4 * block_n)))


def _multiprocessors(device: torch.device) -> int:
    """Of an H100 where there is no GPU to ask."""
    return _count(device.index or 0) if device.type == "cuda" else 132


@lru_cache
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def target_of(device: torch.device) -> str:
    """The target that kernels on ``device`` are compiled for; see `orthorank_kernels.settings.lookup`."""
    return _settings.INTERPRETER if device.type == "cpu" else _gpu_target(device.index or 0)


@lru_cache
def _gpu_target(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return f"{properties.gcnArchName.split(':')[0]} {properties.name}"
    return f"sm_{properties.major}{properties.minor} {properties.name}"


def vendor(target: str) -> str:
    """Whose GPU it is; "" for the interpreter.

    >>> vendor("sm_90 NVIDIA H100 80GB HBM3"), vendor("gfx942"), vendor("interpreter")
    ('nvidia', 'amd', '')
    """
    return "nvidia" if target.startswith("sm_") else "amd" if family(target) == "amd" else ""


def fits_tma(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe ``x``: 16-byte aligned base and strides, nothing empty or expanded."""
    if not _has_descriptors():
        return False
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0 and x.numel() > 0


@lru_cache
def _has_descriptors() -> bool:
    """Triton has them from 3.4 on; ``ORTHORANK_TMA=0`` says not to use them.

    Looked up once: finding a module takes longer than a launch.
    """
    return os.environ.get("ORTHORANK_TMA") != "0" and find_spec("triton.tools.tensor_descriptor") is not None
