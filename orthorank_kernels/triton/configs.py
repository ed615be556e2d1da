"""Launch settings that were chosen without a GPU: from registers, spills and shared memory of the compiled kernels.

Pure functions of shapes, dtype and target, so that a test can compile exactly what would be launched. A target is a
string: ``"sm_80"``, ``"sm_90"``, ``"gfx942"``, or ``"interpreter"``.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
import triton


@dataclass(frozen=True)
class AttentionTile:
    """Rows of queries x heads, keys per step, and how they are run."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Tiles for 16-bit inputs, by family and padded head_dim. 128 rows halve the traffic of K and V against 64; 8 warps hold
# them without spilling. The bound is shared memory (99 KiB on "ampere-small") or registers.
_TILES = {
    "blackwell": {
        64: AttentionTile(128, 128, 8, 2),
        128: AttentionTile(128, 128, 8, 2),
        256: AttentionTile(128, 32, 8, 2),
    },
    "hopper": {
        64: AttentionTile(128, 128, 8, 2),
        128: AttentionTile(128, 128, 8, 2),
        256: AttentionTile(128, 64, 8, 2),
    },
    "ampere": {64: AttentionTile(128, 128, 8, 2), 128: AttentionTile(128, 64, 8, 2), 256: AttentionTile(64, 64, 8, 2)},
    "ampere-small": {
        64: AttentionTile(128, 128, 8, 2),
        128: AttentionTile(128, 64, 8, 2),
        256: AttentionTile(64, 32, 4, 2),
    },
    "volta": {64: AttentionTile(64, 64, 4, 1), 128: AttentionTile(64, 32, 4, 1), 256: AttentionTile(32, 32, 4, 1)},
    "amd": {64: AttentionTile(128, 64, 4, 1), 128: AttentionTile(128, 32, 4, 1), 256: AttentionTile(64, 32, 8, 1)},
}
# Float32 has no tensor cores here (ieee products): larger tiles spill in the loop.
_FLOAT32_TILES = {64: AttentionTile(64, 16, 4, 1), 128: AttentionTile(64, 16, 8, 2), 256: AttentionTile(32, 16, 8, 1)}
_INTERPRETER = AttentionTile(32, 32, 1, 1)
_LARGEST_PACK = 16  # heads in one tile; a group of 71 would leave 57 of 128 rows idle, in tiles of 15 it leaves 8


def launch_settings(
    head_dim: int, group: int, dtype: torch.dtype, target: str
) -> tuple[dict[str, int | bool], int, int]:
    """Settings of the attention kernel: (constexprs, num_warps, num_stages).

    Args:
        head_dim: 1 to 256; group: query heads for each key/value head; dtype: of q, k and v.
        target: ``target_of(device)``.
    """
    tile = _attention_tile(max(64, triton.next_power_of_2(head_dim)), dtype, target)
    head_tiles = triton.cdiv(group, min(_LARGEST_PACK, tile.block_m))
    constexprs = {
        "GROUP": group,
        "PACK": triton.cdiv(group, head_tiles),
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "TMA": family(target) in ("hopper", "blackwell") and dtype.itemsize == 2,
    }
    return constexprs, tile.num_warps, tile.num_stages


def _attention_tile(padded: int, dtype: torch.dtype, target: str) -> AttentionTile:
    if target == "interpreter":
        return _INTERPRETER
    if dtype.itemsize == 4:
        return _FLOAT32_TILES[padded]
    return _TILES[family(target)][padded]


def family(target: str) -> str:
    """Targets that share launch settings."""
    if not target.startswith("sm_"):
        return "amd"
    capability = int(target.removeprefix("sm_"))
    if 90 <= capability < 120:
        return "hopper" if capability < 100 else "blackwell"
    if capability >= 80:  # 80 and 87 have 163 KiB of shared memory for a program; 86, 89 and 120 have 99
        return "ampere" if capability in (80, 87) else "ampere-small"
    return "volta"


def target_of(device: torch.device) -> str:
    """The target that kernels on ``device`` are compiled for."""
    return "interpreter" if device.type == "cpu" else _gpu_target(device.index or 0)


@lru_cache
def _gpu_target(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def fits_tma(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe ``x``: 16-byte aligned base and strides, nothing empty or expanded."""
    if find_spec("triton.tools.tensor_descriptor") is None:  # Triton before 3.4
        return False
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0 and x.numel() > 0
