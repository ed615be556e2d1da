"""Launch settings that were chosen without a GPU: from registers, spills and shared memory of the compiled kernels.

Pure functions of shapes, dtype and target, so that a test can compile exactly what would be launched. A target is a
string: ``"sm_80"``, ``"sm_90"``, ``"gfx942"``, or ``"interpreter"``.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton


@dataclass(frozen=True)
class AttentionTile:
    """Rows of queries x heads, keys per step, and how they are run."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (oldest compute capability, padded head_dim) -> tile, for 16-bit inputs. The first row that is not too new wins.
_NVIDIA = {
    90: {64: AttentionTile(128, 128, 8, 2), 128: AttentionTile(128, 128, 8, 2), 256: AttentionTile(128, 64, 8, 2)},
    80: {64: AttentionTile(128, 128, 8, 2), 128: AttentionTile(128, 64, 8, 2), 256: AttentionTile(128, 32, 8, 2)},
    70: {64: AttentionTile(64, 64, 4, 1), 128: AttentionTile(64, 32, 4, 1), 256: AttentionTile(32, 32, 4, 1)},
}
_AMD = {64: AttentionTile(128, 64, 4, 1), 128: AttentionTile(128, 64, 8, 1), 256: AttentionTile(64, 64, 8, 1)}
_INTERPRETER = AttentionTile(32, 32, 1, 1)
_LARGEST_PACK = 16  # heads in one tile; more would leave few queries and a wide range of positions' heads idle


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
        "TMA": capability(target) >= 90 and dtype.itemsize == 2,
    }
    return constexprs, tile.num_warps, tile.num_stages


def _attention_tile(padded: int, dtype: torch.dtype, target: str) -> AttentionTile:
    if target == "interpreter":
        return _INTERPRETER
    if dtype.itemsize == 4:  # no tensor cores: ieee products; a smaller tile, else everything spills
        return AttentionTile(64, 32, 4, 1) if padded <= 128 else AttentionTile(32, 32, 4, 1)
    if not capability(target):
        return _AMD[padded]
    newest = next(oldest for oldest in _NVIDIA if capability(target) >= oldest)
    return _NVIDIA[newest][padded]


def capability(target: str) -> int:
    """80 for ``"sm_80"``; 0 for what is not an NVIDIA GPU."""
    return int(target.removeprefix("sm_")) if target.startswith("sm_") else 0


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
    """Whether a tensor descriptor can describe ``x``: 16-byte aligned base and strides, no empty dimension."""
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0 and x.numel() > 0
