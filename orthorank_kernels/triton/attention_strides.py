"""Strides as both attention kernels take them, by name."""

import torch


def output_strides(
    out: torch.Tensor, lse: torch.Tensor | None, dims: tuple[str, ...] = ("batch", "head", "token")
) -> dict[str, int]:
    """Of ``out`` ``[*dims, head_dim]`` and ``lse`` ``[*dims]``.

    >>> output_strides(torch.empty(2, 3, 5, 8), None)["stride_out_head"]
    40
    """
    strides = {}
    for i, name in enumerate(dims):
        strides[f"stride_out_{name}"] = out.stride(i)
        strides[f"stride_lse_{name}"] = 0 if lse is None else lse.stride(i)
    return strides


def table_strides(**tables: torch.Tensor | None) -> dict[str, int]:
    """Of tables ``[batch or 1, tokens, width]``; one for all rows of a batch has stride 0 between them.

    >>> table_strides(cos=torch.empty(1, 5, 8), sin=None)
    {'stride_cos_batch': 0, 'stride_cos_token': 8, 'stride_sin_batch': 0, 'stride_sin_token': 0}
    """
    strides = {}
    for name, table in tables.items():
        strides[f"stride_{name}_batch"] = 0 if table is None or table.shape[0] == 1 else table.stride(0)
        strides[f"stride_{name}_token"] = 0 if table is None else table.stride(1)
    return strides
