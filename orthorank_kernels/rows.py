"""Selected rows of the residual stream: read them, add and normalise them, write them back.

The selected layer of OrthoRank runs its query, output projection and MLP on the selected tokens alone (paper, section
3.3, Algorithm 1). These three ops carry rows between the whole sequence and the selected part of it. All take
``positions``, int32 ``[batch, selected]``: indices into the row's token axis, -1 where a batch row has fewer selected
tokens than another. A missing entry gives zeros in a gather and is skipped in a scatter.

Positions are trusted: one past the token axis is an IndexError on a CPU and undefined on a GPU, since looking at the
values would make the host wait for the device.
"""

import torch

from orthorank_kernels import _checks, _library, dispatch
from orthorank_kernels.reference import rows as reference


def gather_rows(x: torch.Tensor, positions: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Read the rows of ``x`` at ``positions``: ``y[b, i] = x[b, positions[b, i]]``.

    Args:
        x: ``[batch, tokens, hidden]``, floating point. Any strides, the last one 1.
        positions: int32 ``[batch, selected]``; -1 gives a row of zeros.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``[batch, selected, hidden]``, contiguous, dtype of ``x``. Differentiable in ``x``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device.
        BackendError: ``backend="triton"`` cannot run here.

    >>> x = torch.arange(6.0).reshape(1, 3, 2)
    >>> gather_rows(x, torch.tensor([[0, 2, -1]], dtype=torch.int32))
    tensor([[[0., 1.],
             [4., 5.],
             [0., 0.]]])
    """
    _checks.tensor("x", x, "[batch, tokens, hidden]")
    _checks.positions(positions, x.shape[0], x)
    _checks.unit_last_stride(x=x, positions=positions)
    return dispatch.run(
        _GATHER_ROWS,
        (x, positions),
        backend=backend,
        device=x.device,
    )


def gather_add_rms_norm(
    hidden_states: torch.Tensor,
    positions: torch.Tensor,
    addend: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to the selected rows and normalise the sum, in one pass.

    ``residual[b, i] = hidden_states[b, positions[b, i]] + addend[b, i]`` and ``normed = RMSNorm(residual)``: what
    stands between attention and MLP in a selected layer. The rounding is Hugging Face's: the sum is rounded to the
    dtype, normalised in float32, rounded, and then multiplied by the weight.

    Args:
        hidden_states: ``[batch, tokens, hidden]``, floating point. Any strides, the last one 1.
        positions: int32 ``[batch, selected]``; -1 gives zeros in both outputs, whatever ``addend`` holds there.
        addend: ``[batch, selected, hidden]``, dtype of ``hidden_states``. Any strides, the last one 1.
        weight: ``[hidden]``, dtype of ``hidden_states``.
        eps: added to the mean square, above 0.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``(residual, normed)``, both ``[batch, selected, hidden]``, contiguous, dtype of ``hidden_states``.
        Differentiable in all floating inputs.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or value.
        BackendError: ``backend="triton"`` cannot run here.

    >>> hidden_states = torch.tensor([[[1.0, 1.0], [3.0, 4.0]]])
    >>> positions = torch.tensor([[1]], dtype=torch.int32)
    >>> residual, normed = gather_add_rms_norm(hidden_states, positions, torch.ones(1, 1, 2), torch.ones(2), 1e-6)
    >>> residual
    tensor([[[4., 5.]]])
    >>> normed
    tensor([[[0.8835, 1.1043]]])
    """
    _checks.tensor("hidden_states", hidden_states, "[batch, tokens, hidden]")
    batch, _, hidden = hidden_states.shape
    _checks.positions(positions, batch, hidden_states)
    _checks.tensor("addend", addend, "[batch, selected, hidden]")
    _checks.shape("addend", addend, (batch, positions.shape[1], hidden), "the shape of positions and hidden_states")
    _checks.tensor("weight", weight, "[hidden]")
    _checks.shape("weight", weight, (hidden,), "the shape of hidden_states")
    _checks.same_dtype("hidden_states", hidden_states, addend=addend, weight=weight)
    _checks.same_device("hidden_states", hidden_states, addend=addend, weight=weight)
    _checks.unit_last_stride(hidden_states=hidden_states, positions=positions, addend=addend, weight=weight)
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be above 0, or a row of zeros has no norm")
    return dispatch.run(
        _GATHER_ADD_RMS_NORM,
        (hidden_states, positions, addend, weight, eps),
        backend=backend,
        device=hidden_states.device,
    )


def scatter_rows_(out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, *, backend: str = "auto") -> None:
    """Write rows back in place: ``out[b, positions[b, i]] = rows[b, i]``. Rows that no position names stay as they are.

    Args:
        out: ``[batch, tokens, hidden]``, floating point, written in place. Any strides, the last one 1.
        positions: int32 ``[batch, selected]``; -1 is skipped. The same position twice in one batch row leaves either
            of the two rows there, or a mixture: it is undefined.
        rows: ``[batch, selected, hidden]``, dtype of ``out``. Any strides, the last one 1.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device.
        BackendError: ``backend="triton"`` cannot run here.

    >>> out = torch.zeros(1, 3, 2)
    >>> scatter_rows_(out, torch.tensor([[2, -1]], dtype=torch.int32), torch.ones(1, 2, 2))
    >>> out
    tensor([[[0., 0.],
             [0., 0.],
             [1., 1.]]])
    """
    _checks.tensor("out", out, "[batch, tokens, hidden]")
    _checks.positions(positions, out.shape[0], out)
    _checks.tensor("rows", rows, "[batch, selected, hidden]")
    _checks.shape("rows", rows, (*positions.shape, out.shape[2]), "the shape of positions and out")
    _checks.same_dtype("out", out, rows=rows)
    _checks.same_device("out", out, rows=rows)
    _checks.unit_last_stride(out=out, positions=positions, rows=rows)
    if any(out.shape[d] > 1 and out.stride(d) == 0 for d in (0, 1)):
        raise ValueError(
            f"out has strides {list(out.stride())}; a stride of 0 makes several rows share memory: pass out.clone()"
        )
    dispatch.run(
        _SCATTER_ROWS,
        (out, positions, rows),
        backend=backend,
        device=out.device,
    )


def _fake_gather_rows(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*positions.shape, x.shape[2])


def _fake_gather_add_rms_norm(
    hidden_states: torch.Tensor, positions: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = hidden_states.new_empty(*positions.shape, hidden_states.shape[2])
    return residual, torch.empty_like(residual)


_GATHER_ROWS = _library.define(
    "gather_rows(Tensor x, Tensor positions) -> Tensor",
    cpu=reference.gather_rows,
    triton="rows.gather_rows",
    fake=_fake_gather_rows,
)
_GATHER_ADD_RMS_NORM = _library.define(
    "gather_add_rms_norm(Tensor hidden_states, Tensor positions, Tensor addend, Tensor weight, float eps)"
    " -> (Tensor, Tensor)",
    cpu=reference.gather_add_rms_norm,
    triton="rows.gather_add_rms_norm",
    fake=_fake_gather_add_rms_norm,
)
_SCATTER_ROWS = _library.define(
    "scatter_rows_(Tensor(a!) out, Tensor positions, Tensor rows) -> ()",
    cpu=reference.scatter_rows_,
    triton="rows.scatter_rows_",
    fake=lambda out, positions, rows: None,
)
