"""Selected rows of the residual stream: read them, write them back.

The selected layer of OrthoRank runs its query, output projection and MLP on the selected tokens alone (paper, section
3.3, Algorithm 1). These ops carry rows between the whole sequence and the selected part of it; `gather_add_rms_norm`
adds and normalises on the way. Two layouts:

- batch: ``[batch, tokens, hidden]`` with ``positions`` int32 ``[batch, selected]``, indices into the row's token axis;
- packed: ``[total, hidden]``, sequences one after another, with ``positions`` int32 ``[selected]``, indices into the
  packed axis (the ``rows`` of `select_tokens`), whichever sequence they belong to.

-1 marks a missing entry, where fewer tokens were selected than there is room for. It gives zeros in a gather and is
skipped in a scatter. One past the token axis is an IndexError on a CPU and undefined on a GPU, where positions are
trusted, since looking at the values would make the host wait for the device.

What a scatter writes to may not be a leaf that requires grad, nor a view of one, unless grad mode is off: PyTorch lets
nothing write to those.
"""

import torch

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.pytorch import rows as pytorch
from orthorank_kernels.reference import rows as reference


@planned
def gather_rows(
    x: torch.Tensor, positions: torch.Tensor, *, out: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Read the rows of ``x`` at ``positions``: ``y[b, i] = x[b, positions[b, i]]``.

    Args:
        x: ``[batch, tokens, hidden]`` or ``[total, hidden]``, floating point. Any strides, the last one 1.
        positions: int32 ``[batch, selected]`` or ``[selected]``; -1 gives a row of zeros.
        out: where to write the result: its shape and dtype, contiguous, apart from ``x``. None: new memory.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[batch, selected, hidden]`` or ``[selected, hidden]``, contiguous, dtype of ``x``; ``out`` if it is given.
        Differentiable in ``x``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device.
        IndexError: on a CPU, a position is past the token axis.
        BackendError: ``backend="triton"`` cannot run here, or ``out`` is given and ``x`` requires grad.

    >>> x = torch.arange(6.0).reshape(1, 3, 2)
    >>> gather_rows(x, torch.tensor([[0, 2, -1]], dtype=torch.int32))
    tensor([[[0., 1.],
             [4., 5.],
             [0., 0.]]])
    >>> gather_rows(x[0], torch.tensor([1], dtype=torch.int32))
    tensor([[2., 3.]])
    """
    packed = check_rows("x", x, positions)
    _checks.unit_last_stride(x=x)
    if out is not None:
        _checks.output("out", out, (*positions.shape, x.shape[-1]), x.dtype, x)
    result = dispatch.run(
        _GATHER_ROWS,
        batch_of_one(x, positions) if packed else (x, positions),
        backend=backend,
        device=x.device,
        out=None if out is None else batch_of_one(out) if packed else (out,),
    )
    if out is not None:
        return out
    return result.squeeze(0) if packed else result


@planned
def scatter_rows_(out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, *, backend: str = "auto") -> None:
    """Write rows back in place: ``out[b, positions[b, i]] = rows[b, i]``. Rows that no position names stay as they are.

    Args:
        out: ``[batch, tokens, hidden]`` or ``[total, hidden]``, floating point, written in place. The last stride is 1,
            the others are any that make no two elements share memory.
        positions: int32 ``[batch, selected]`` or ``[selected]``; -1 is skipped. The same position twice in one batch
            row leaves either of the two rows there, or a mixture: it is undefined.
        rows: ``[batch, selected, hidden]`` or ``[selected, hidden]``, dtype of ``out``, apart from ``out`` in memory.
            Any strides, the last one 1.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device.
        IndexError: on a CPU, a position is past the token axis.
        BackendError: ``backend="triton"`` cannot run here, or ``out`` cannot be written to.

    >>> out = torch.zeros(1, 3, 2)
    >>> scatter_rows_(out, torch.tensor([[2, -1]], dtype=torch.int32), torch.ones(1, 2, 2))
    >>> out
    tensor([[[0., 0.],
             [0., 0.],
             [1., 1.]]])
    """
    packed = _check_scatter(out, positions, rows)
    args = (out, positions, rows)
    dispatch.run(_SCATTER_ROWS, batch_of_one(*args) if packed else args, backend=backend, device=out.device)


@planned
def scatter_add_rows_(
    out: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    residual: torch.Tensor,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """Add and write back in place: ``out[b, positions[b, i]] = residual[b, i] + scale * rows[b, i]``.

    The end of a selected layer: ``rows`` are the MLP's output and ``residual`` is what `gather_add_rms_norm` returned.
    What ``out`` held at the positions is not read. The product is rounded to the dtype before the sum is, as in models
    with a residual multiplier.

    Args:
        out, positions: as for `scatter_rows_`.
        rows: ``[batch, selected, hidden]`` or ``[selected, hidden]``, dtype of ``out``, apart from ``out`` in memory.
            Any strides, the last one 1.
        residual: like ``rows``.
        scale: factor on ``rows`` (Granite's residual multiplier).
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device.
        IndexError: on a CPU, a position is past the token axis.
        BackendError: ``backend="triton"`` cannot run here, or ``out`` cannot be written to.

    >>> out = torch.zeros(3, 2)
    >>> rows, residual = torch.ones(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> scatter_add_rows_(out, torch.tensor([2, -1], dtype=torch.int32), rows, residual, scale=0.5)
    >>> out
    tensor([[0.0000, 0.0000],
            [0.0000, 0.0000],
            [1.5000, 2.5000]])
    """
    packed = _check_scatter(out, positions, rows)
    _checks.number("scale", scale)
    _checks.tensor("residual", residual, "[selected, hidden]" if packed else "[batch, selected, hidden]")
    _checks.shape("residual", residual, rows.shape, "the shape of rows")
    _checks.same_dtype("out", out, residual=residual)
    _checks.same_device("out", out, residual=residual)
    _checks.unit_last_stride(residual=residual)
    _checks.apart("out", out, "residual", residual)
    args = (out, positions, rows, residual)
    dispatch.run(
        _SCATTER_ADD_ROWS,
        (*(batch_of_one(*args) if packed else args), scale),
        backend=backend,
        device=out.device,
    )


def check_rows(name: str, x: torch.Tensor, positions: torch.Tensor) -> bool:
    """Check the layout of ``x``, called ``name``, and of ``positions``; whether it is the packed one."""
    packed = isinstance(x, torch.Tensor) and x.dim() == 2
    _checks.tensor(name, x, "[total, hidden]" if packed else "[batch, tokens, hidden]", packed="packed [total, hidden]")
    _checks.positions(positions, None if packed else x.shape[0], x)
    _checks.positions_inside(positions, x.shape[-2], name)
    return packed


def batch_of_one(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Packed tensors as the operators take them, which know the batch layout alone. Views: nothing is copied."""
    return tuple(t.unsqueeze(0) for t in tensors)


def _check_scatter(out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> bool:
    packed = check_rows("out", out, positions)
    _checks.tensor("rows", rows, "[selected, hidden]" if packed else "[batch, selected, hidden]")
    _checks.shape("rows", rows, (*positions.shape, out.shape[-1]), "the shape of positions and out")
    _checks.same_dtype("out", out, rows=rows)
    _checks.same_device("out", out, rows=rows)
    _checks.unit_last_stride(out=out, rows=rows)
    _checks.no_overlap("out", out)
    for name, value in (("rows", rows), ("positions", positions)):
        _checks.apart("out", out, name, value)
    return packed


_GATHER_ROWS = _library.define(
    pytorch.gather_rows,
    reference=reference.gather_rows,
    triton="rows.gather_rows",
    fake=lambda call: call.x.new_empty(*call.positions.shape, call.x.shape[2]),
    outputs=("out",),
)
_SCATTER_ROWS = _library.define(
    pytorch.scatter_rows_,
    reference=reference.scatter_rows_,
    triton="rows.scatter_rows_",
    changes=("out",),
)
_SCATTER_ADD_ROWS = _library.define(
    pytorch.scatter_add_rows_,
    reference=reference.scatter_add_rows_,
    triton="rows.scatter_add_rows_",
    changes=("out",),
)
