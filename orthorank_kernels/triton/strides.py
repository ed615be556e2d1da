"""Strides as kernels take them, by name: ``stride_x_batch`` beside ``x_ptr``; 0 for what is not there."""

import torch


def strides(*dims: str, **tensors: torch.Tensor | None) -> dict[str, int]:
    """Of the first dimensions of each tensor, which are named; the last has stride 1 and no name.

    >>> strides("batch", "token", x=torch.empty(2, 5, 8), residual=None)
    {'stride_x_batch': 40, 'stride_x_token': 8, 'stride_residual_batch': 0, 'stride_residual_token': 0}
    """
    return {
        f"stride_{name}_{dim}": 0 if x is None else x.stride(i)
        for name, x in tensors.items()
        for i, dim in enumerate(dims)
    }


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
