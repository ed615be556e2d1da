"""Gather, add and norm: what stands between attention and MLP in a selected layer, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.ops.rows import batch_of_one, check_rows
from orthorank_kernels.pytorch import add_norm as pytorch
from orthorank_kernels.reference import rows as reference

NORMS = ("rms", "layer", "identity")


class AddNorm(NamedTuple):
    """What `gather_add_rms_norm` returns."""

    residual: Tensor
    normed: Tensor


@planned
def gather_add_rms_norm(
    hidden_states: Tensor,
    positions: Tensor,
    addend: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    norm: str = "rms",
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    scale: float = 1.0,
    addend_weight: Tensor | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
    backend: str = "auto",
) -> AddNorm:
    """Add to the selected rows and normalise the sum, in one pass.

    ``residual[b, i] = hidden_states[b, positions[b, i]] + scale * addend[b, i]`` and ``normed = RMSNorm(residual)``:
    what stands between attention and MLP in a selected layer (paper, Algorithm 1). Layouts and missing entries are
    those of `gather_rows`.

    The rounding is Hugging Face's: product, sum and norm are each rounded to the dtype, and Llama's norm a second time,
    before the weight multiplies it; RMSNorm with ``weight_offset`` (Gemma) and LayerNorm are float32 to their end.

    Args:
        hidden_states: ``[batch, tokens, hidden]`` or ``[total, hidden]``, floating point. Any strides, the last one 1.
        positions: int32 ``[batch, selected]`` or ``[selected]``; -1 gives zeros in both outputs, whatever ``addend``
            holds there.
        addend: ``[batch, selected, hidden]`` or ``[selected, hidden]``, dtype of ``hidden_states``. Any strides, the
            last one 1.
        weight: ``[hidden]``, dtype of ``hidden_states``; None: ones.
        eps: added to the mean square, above 0.
        norm: ``"rms"``; ``"layer"``: LayerNorm; ``"identity"``: no norm before the MLP (OLMo-2), ``normed`` is
            ``residual`` itself.
        bias: ``[hidden]``, of LayerNorm; None: zeros.
        weight_offset: added to the weights, 1 for Gemma.
        scale: factor on the addend (Granite's residual multiplier).
        addend_weight: ``[hidden]``; the addend goes through an RMSNorm with this weight, ``eps`` and ``weight_offset``
            before it is scaled and added (Gemma's sandwich, OLMo-2). None: it does not.
        out: where to write ``(residual, normed)``: shape and dtype of ``addend``, contiguous, apart from
            ``hidden_states``; either may be ``addend`` itself. None: new memory. With ``norm="identity"`` the second
            is None.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        `AddNorm`: residual and normed, both ``[batch, selected, hidden]`` or ``[selected, hidden]``, contiguous, dtype
        of ``hidden_states``. Differentiable in all floating inputs.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or value.
        IndexError: on a CPU, a position is past the token axis.
        BackendError: ``backend="triton"`` cannot run here, or ``out`` is given and an input requires grad.

    >>> hidden_states = torch.tensor([[[1.0, 1.0], [3.0, 4.0]]])
    >>> positions = torch.tensor([[1]], dtype=torch.int32)
    >>> residual, normed = gather_add_rms_norm(hidden_states, positions, torch.ones(1, 1, 2), torch.ones(2), 1e-6)
    >>> residual
    tensor([[[4., 5.]]])
    >>> normed
    tensor([[[0.8835, 1.1043]]])
    """
    packed = check_rows("hidden_states", hidden_states, positions)
    _checks.tensor("addend", addend, "[selected, hidden]" if packed else "[batch, selected, hidden]")
    hidden = hidden_states.shape[-1]
    _checks.shape("addend", addend, (*positions.shape, hidden), "the shape of positions and hidden_states")
    _check_norm(hidden_states, weight, eps, norm, bias, weight_offset, scale, addend_weight)
    _checks.same_dtype("hidden_states", hidden_states, addend=addend)
    _checks.same_device("hidden_states", hidden_states, addend=addend)
    _checks.unit_last_stride(hidden_states=hidden_states, addend=addend)
    if out is not None:
        _check_out(out, addend, norm)
    rows = (hidden_states, positions, addend)
    results = dispatch.run(
        _GATHER_ADD_RMS_NORM,
        (*(batch_of_one(*rows) if packed else rows), weight, eps, norm, bias, weight_offset, scale, addend_weight),
        backend=backend,
        device=hidden_states.device,
        out=out if out is None or not packed else tuple(None if t is None else t.unsqueeze(0) for t in out),
    )
    residual, normed = out if out is not None else [r.squeeze(0) if packed else r for r in results]
    return AddNorm(residual, residual if normed is None or norm == "identity" else normed)


def _check_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    norm: str,
    bias: Tensor | None,
    weight_offset: float,
    scale: float,
    addend_weight: Tensor | None,
) -> None:
    _checks.choice("norm", norm, NORMS)
    _checks.number("eps", eps, above=0, because="or a row of zeros has no norm")
    _checks.number("weight_offset", weight_offset)
    _checks.number("scale", scale)
    for name, vector in (("weight", weight), ("bias", bias), ("addend_weight", addend_weight)):
        if vector is not None:
            _checks.tensor(name, vector, "[hidden]")
            _checks.shape(name, vector, (x.shape[-1],), "the shape of hidden_states")
            _checks.same_dtype("hidden_states", x, **{name: vector})
            _checks.same_device("hidden_states", x, **{name: vector})
            _checks.unit_last_stride(**{name: vector})
    if bias is not None and norm != "layer":
        raise ValueError(f'bias is given and norm is {norm!r}, which has none; pass norm="layer", or bias=None')
    if weight is not None and norm == "identity":
        raise ValueError("weight is given and norm is 'identity', which has none; pass weight=None")
    if weight_offset and weight is None and addend_weight is None:
        raise ValueError(f"weight_offset is {weight_offset} and no weight is given that it could be added to")


def _check_out(out: tuple[Tensor, Tensor | None], addend: Tensor, norm: str) -> None:
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"out is {_checks.kind_of(out)}; it must be a tuple (residual, normed)")
    residual, normed = out
    _checks.output("out[0]", residual, addend.shape, addend.dtype, addend)
    if norm != "identity":
        _checks.output("out[1]", normed, addend.shape, addend.dtype, addend)
    elif normed is not None:
        raise ValueError("out[1] is given and norm is 'identity', which writes no normed rows; pass None")


def _fake(call: Any) -> tuple[Tensor, Tensor]:
    residual = call.hidden_states.new_empty(*call.positions.shape, call.hidden_states.shape[2])
    return residual, residual.new_empty(0) if call.norm == "identity" else torch.empty_like(residual)


_GATHER_ADD_RMS_NORM = _library.define(
    pytorch.gather_add_rms_norm,
    reference=reference.gather_add_rms_norm,
    triton="add_norm.gather_add_rms_norm",
    fake=_fake,
    outputs=("residual", "normed?"),
    aliases=("addend",),
)
