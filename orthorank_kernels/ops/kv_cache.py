"""Keys and values into a serving stack's paged cache, the keys rotated on the way."""

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.ops.attention_paged import SPLIT, UNBIND
from orthorank_kernels.ops.rotary import check_tables
from orthorank_kernels.pytorch import kv_cache as pytorch
from orthorank_kernels.reference import rows as reference

INDICES = (torch.int32, torch.int64)


@planned
def apply_rotary_and_cache_(
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    backend: str = "auto",
) -> None:
    """Rotate keys and write them to a paged cache, with their values, in one launch.

    Token t goes to block ``slots[t] // block_size`` and place ``slots[t] % block_size`` of it: its keys as
    `apply_rotary_at` gives them, to the last bit, and its values as they are. What other stacks do by a rotary kernel
    and one that is called ``reshape_and_cache`` (vLLM) or ``append_paged_kv_cache`` (FlashInfer). Nothing is copied
    before: keys and values may be columns of one projection's rows.

    Args:
        k_cache, v_cache: ``[blocks, block_size, kv_heads, head_dim]``, written in place, of the dtype of ``keys``. Any
            strides whose last one is 1 that make no two elements share memory, as the views that
            `sparse_query_attention_paged` reads. Caches of 8 bits are refused, since no scale is applied.
        slots: int32 or int64 ``[tokens]``; -1, or any other slot that the cache has not, for a token that is not
            written. The same slot twice leaves either token there, or a mixture: it is undefined.
        keys: ``[tokens, kv_heads, head_dim]``, floating point, not rotated. Any strides, the last one 1.
        values: like ``keys``.
        cos: ``[tokens, width]``, or ``[positions, width]`` with ``positions``, floating point, any strides, the last
            one 1. ``width`` is ``rotary_dim`` or half of it, as for `apply_rotary_at`.
        sin: like ``cos``.
        positions: int32 or int64 ``[tokens]``, the row of the tables for each token; -1: the token is not written.
            None: the tables hold these tokens, in order. A position past the tables is an IndexError on a CPU,
            undefined on a GPU, unless its token is not written.
        interleaved, rotary_dim: as for `apply_rotary_at`.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device.
        IndexError: on a CPU, a position is past the tables.
        BackendError: ``backend="triton"`` cannot run here, or a cache cannot be written to.

    >>> import torch
    >>> cache = torch.zeros(2, 4, 1, 8)  # 2 blocks of 4 tokens, one head; keys before values in the last axis
    >>> k_cache, v_cache = cache.split(4, -1)
    >>> angle = torch.tensor([0.0, torch.pi / 2]).reshape(2, 1).expand(2, 4)
    >>> keys, values = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(2, 1, 4), torch.ones(2, 1, 4)
    >>> apply_rotary_and_cache_(k_cache, v_cache, torch.tensor([-1, 5]), keys, values, angle.cos(), angle.sin())
    >>> cache[1].round(decimals=3)[:2, 0]
    tensor([[ 0.,  0.,  0.,  0.,  0.,  0.,  0.,  0.],
            [-3., -4.,  1.,  2.,  1.,  1.,  1.,  1.]])
    """
    width = _check(k_cache, v_cache, slots, keys, values, cos, sin, positions, interleaved, rotary_dim)
    args = (k_cache, v_cache, slots, keys, values, cos, sin, positions, interleaved, width)
    dispatch.run(_APPLY_ROTARY_AND_CACHE, args, backend=backend, device=keys.device)


def _check(
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    rotary_dim: int | None,
) -> int:
    """Check all arguments; returns how many elements of a head are rotated."""
    for name, value in (("keys", keys), ("values", values)):
        _checks.tensor(name, value, "[tokens, kv_heads, head_dim]")
    for name, value in (("k_cache", k_cache), ("v_cache", v_cache)):
        _refuse_8_bits(name, value)
        _checks.tensor(name, value, "[blocks, block_size, kv_heads, head_dim]", hints={5: UNBIND})
    _checks.shape("values", values, keys.shape, "the shape of keys")
    if k_cache.shape[1] == 0:
        raise ValueError(f"k_cache has shape {list(k_cache.shape)}; its block_size must be at least 1")
    _checks.shape("k_cache", k_cache, [*k_cache.shape[:2], *keys.shape[1:]], "the shape of keys", SPLIT)
    _checks.shape("v_cache", v_cache, k_cache.shape, "the shape of k_cache")
    _checks.same_dtype("keys", keys, values=values, k_cache=k_cache, v_cache=v_cache)
    _check_index("slots", slots, keys)
    _checks.same_device("keys", keys, values=values, k_cache=k_cache, v_cache=v_cache)
    _checks.unit_last_stride(k_cache=k_cache, v_cache=v_cache, keys=keys, values=values)
    _checks.flag("interleaved", interleaved)
    width = check_tables(("cos", "sin"), cos, sin, "keys", keys, None, rotary_dim)
    if positions is not None:
        _check_index("positions", positions, keys)
        if _checks.readable(slots, positions):
            missing = (slots < 0) | (slots >= k_cache.shape[0] * k_cache.shape[1])
            _checks.positions_inside(positions.masked_fill(missing, -1), cos.shape[0], "cos")
    elif cos.shape[0] != keys.shape[0]:
        raise ValueError(
            f"cos has {cos.shape[0]} tokens and keys {keys.shape[0]}; pass positions to say which rows of the tables "
            "are theirs"
        )
    _check_apart(k_cache=k_cache, v_cache=v_cache, slots=slots, keys=keys, values=values, cos=cos, sin=sin,
                 positions=positions)  # fmt: skip
    return width


def _refuse_8_bits(name: str, cache: object) -> None:
    if isinstance(cache, Tensor) and cache.dtype.itemsize == 1:
        raise TypeError(
            f"{name} has dtype {str(cache.dtype).removeprefix('torch.')}, and this op applies no scale; rotate the "
            f"keys with apply_rotary_at and write both with the stack's own update of its cache, or keep {name} in the "
            "dtype of keys"
        )


def _check_index(name: str, value: object, keys: Tensor) -> None:
    _checks.tensor(name, value, "[tokens]", INDICES)
    assert isinstance(value, Tensor)
    _checks.shape(name, value, keys.shape[:1], "the tokens of keys")
    _checks.same_device("keys", keys, **{name: value})
    _checks.unit_last_stride(**{name: value})


def _check_apart(k_cache: Tensor, v_cache: Tensor, **others: Tensor | None) -> None:
    """What is written shares no memory with anything else. The caches may lie between each other."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.no_overlap(name, cache)
        for other, value in others.items():
            if value is not None:
                _checks.apart(name, cache, other, value)
    _checks.apart("k_cache", k_cache, "v_cache", v_cache)


_APPLY_ROTARY_AND_CACHE = _library.define(
    pytorch.apply_rotary_and_cache_,
    reference=reference.apply_rotary_and_cache_,
    triton="kv_cache.apply_rotary_and_cache_",
    changes=("k_cache", "v_cache"),
)
