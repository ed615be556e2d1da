"""Keys and values in the caches of serving stacks, as `sparse_query_attention_paged` reads them: nothing is copied."""

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError

FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def split_last(cache: Tensor, head_dim: int, fp8: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """vLLM from 0.26 on: one tensor for each layer, a head's keys and values side by side.

    Args:
        cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, strides as the stack laid it out.
        head_dim: channels of a head; fp8: what the bytes of an 8-bit cache are, None: the cache has its dtype.

    Returns:
        Keys and values ``[blocks, block_size, kv_heads, head_dim]``.

    Raises:
        OrthoRankError: the cache has another shape, such as one with scales behind the values, or not 8 bits.

    Example:
        >>> keys, values = split_last(torch.zeros(10, 2, 16, 128), 64)
        >>> keys.shape, values.stride()
        (torch.Size([10, 16, 2, 64]), (4096, 128, 2048, 1))
    """
    if cache.dim() != 4 or cache.shape[-1] != 2 * head_dim:
        raise OrthoRankError(
            f"the cache has shape {list(cache.shape)}; with {head_dim} channels a head it must be "
            f"[blocks, kv_heads, block_size, {2 * head_dim}]"
        )
    if fp8 is not None:
        if cache.element_size() != 1:
            dtype = str(cache.dtype).removeprefix("torch.")
            raise OrthoRankError(f"the cache has dtype {dtype}; an 8-bit cache has one of 8 bits: leave fp8 out")
        cache = cache.view(fp8)
    keys, values = cache.transpose(1, 2).split(head_dim, dim=-1)
    return keys, values


def pages_of_slots(keys: Tensor, values: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """SGLang: a buffer of slots for each layer. With pages of 1 its ``req_to_token`` is the block table.

    Args:
        keys, values: ``[slots, kv_heads, head_dim]``; page_size: slots of a page, a divisor of their number.

    Returns:
        Keys and values ``[pages, page_size, kv_heads, head_dim]``.

    Raises:
        OrthoRankError: the slots are no whole pages, or the buffers have other shapes.

    Example:
        >>> slots = torch.zeros(64, 2, 8)
        >>> pages_of_slots(slots, slots, 16)[0].shape
        torch.Size([4, 16, 2, 8])
    """
    if keys.dim() != 3:
        raise OrthoRankError(f"keys has shape {list(keys.shape)}; it must be [slots, kv_heads, head_dim]")
    if values.shape != keys.shape:
        raise OrthoRankError(f"values has shape {list(values.shape)}; it must be that of keys, {list(keys.shape)}")
    if page_size < 1 or keys.shape[0] % page_size:
        raise OrthoRankError(f"page_size is {page_size}; it must divide the {keys.shape[0]} slots of the buffer")
    return keys.unflatten(0, (-1, page_size)), values.unflatten(0, (-1, page_size))
