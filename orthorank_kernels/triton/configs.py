"""Launch settings of the attention kernel, and what they depend on: the GPU and what its hardware can describe.

The tiles themselves are data: `configs/sparse_query_attention.*.json`, read by `orthorank_kernels._settings`. Chosen
without a GPU: 128 rows halve the traffic of K and V against 64, and 8 warps hold them without spilling; the bound is
shared memory (99 KiB on "ampere-small") or registers. Float32 has no tensor cores here (ieee products): larger tiles
spill in the loop.

Functions of shapes, dtype and target, so that a test can compile exactly what would be launched.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch
import triton

from orthorank_kernels import _settings
from orthorank_kernels._settings import family

_LARGEST_PACK = 16  # heads in one tile; a group of 71 would leave 57 of 128 rows idle, in tiles of 15 it leaves 8


def launch_settings(
    head_dim: int, group: int, dtype: torch.dtype, target: str
) -> tuple[dict[str, int | bool], int, int]:
    """Settings of the attention kernel: (constexprs, num_warps, num_stages).

    Args:
        head_dim: 1 to 256; group: query heads for each key/value head; dtype: of q, k and v.
        target: ``target_of(device)``.
    """
    padded = max(64, triton.next_power_of_2(head_dim))
    tile = _settings.look_up("sparse_query_attention", f"{8 * dtype.itemsize}-bit, head_dim {padded}", target)
    head_tiles = triton.cdiv(group, min(_LARGEST_PACK, tile["block_m"]))
    constexprs = {
        "GROUP": group,
        "PACK": triton.cdiv(group, head_tiles),
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": tile["block_m"],
        "BLOCK_N": tile["block_n"],
        "TMA": family(target) in ("hopper", "blackwell") and dtype.itemsize == 2,
    }
    return constexprs, tile["num_warps"], tile["num_stages"]


def target_of(device: torch.device) -> str:
    """The target that kernels on ``device`` are compiled for; see `orthorank_kernels._settings`."""
    return _settings.INTERPRETER if device.type == "cpu" else _gpu_target(device.index or 0)


@lru_cache
def _gpu_target(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return f"{properties.gcnArchName.split(':')[0]} {properties.name}"
    return f"sm_{properties.major}{properties.minor} {properties.name}"


def fits_tma(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe ``x``: 16-byte aligned base and strides, nothing empty or expanded."""
    if not _has_descriptors():
        return False
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0 and x.numel() > 0


@lru_cache
def _has_descriptors() -> bool:
    """Triton has them from 3.4 on. Looked up once: finding a module takes longer than a launch."""
    return find_spec("triton.tools.tensor_descriptor") is not None
