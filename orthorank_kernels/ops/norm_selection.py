"""The norm, the score and the selection in one kernel launch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.layout import norm_outputs, selection_outputs
from orthorank_kernels.ops.norm_score import check_norm, check_norm_out, check_numbers, norm_result
from orthorank_kernels.ops.selection import OUTPUTS, select_request, select_result
from orthorank_kernels.pytorch import norm_selection as pytorch
from orthorank_kernels.reference import selection as reference


class NormSelection(NamedTuple):
    """Result of `rms_norm_select`; a field that was not asked for, or that the layout has not, is None."""

    normed: Tensor | None
    scores: Tensor
    residual: Tensor | None
    positions: Tensor
    counts: Tensor
    rows: Tensor | None
    cu_selected: Tensor | None


@planned
def rms_norm_select(
    hidden_states: Tensor,
    weight: Tensor | None,
    eps: float,
    k: int | Tensor | None = None,
    *,
    threshold: float | Tensor | None = None,
    residual: Tensor | None = None,
    norm: str = "rms",
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    score: str = "inner",
    sink: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_offsets: Tensor | None = None,
    keep_last: int = 0,
    max_selected: int | None = None,
    write_norm: bool = True,
    copy_input: bool = False,
    workspace: Tensor | None = None,
    out: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> NormSelection:
    """`rms_norm_score` and `select_tokens` on its scores, in one kernel launch.

    The results are those of the two calls, bit for bit.

    Args:
        hidden_states: ``[batch, tokens, hidden]``, or packed ``[total, hidden]`` with ``cu_seqlens``; float32, float16
            or bfloat16, the last stride 1.
        weight, bias: ``[hidden]``, of the norm; None: ones, zeros. ``bias`` is for ``norm="layer"``.
        eps: added to the mean of squares, or to the variance.
        k: tokens to select: an int, or int32 or int64 ``[batch]`` or ``[seqs]``; see `keep_count`.
        threshold: instead of ``k``: select all that score below this number, or float32 ``[batch]`` or ``[seqs]``.
        residual: added before the norm, like ``hidden_states``.
        norm: ``"rms"``, ``"layer"`` or ``"identity"`` (none), rounded as `rms_norm_score` says.
        weight_offset: added to the weight in float32: 1 for Gemma.
        score: ``"inner"``: the absolute inner product with the sink's normed state; ``"cosine"``: that of their angle.
        sink: the sink's stored normed state ``[batch, hidden]``, ``[seqs, hidden]`` or ``[hidden]``; None: that of each
            sequence's first valid token.
        starts, lengths: int32 ``[batch]``, each row's first valid token and how many there are; None: the whole row.
        sink_positions: int32 ``[batch]`` or ``[seqs]``, where the sink is, which is selected last; -1: not among these
            tokens; None: the first valid token.
        cu_seqlens: int32 ``[seqs + 1]``, where each packed sequence begins, and ``total``.
        position_offsets: int32 ``[seqs]``, tokens of each packed sequence that precede these. Needs ``sink``.
        keep_last: so many tokens at each sequence's end are selected whatever they score, counted in ``k``.
        max_selected: room in ``positions``; see `select_tokens`.
        write_norm: False: ``normed`` is None and not written. copy_input: ``residual`` is a copy of ``hidden_states``
            where none is given.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.
        workspace: int32 ``[n]``, n at least 1 and the number of rows or sequences, all zero, for the kernel to count
            in. It is zero again afterwards, so one serves all calls that follow each other on a stream, and without it
            each call first fills one with zeros. With 1,025 for each row of a batch, a selection by ``k`` from rows
            of more than 2,048 tokens mostly reads them twice instead of five times.
        out: `NormSelection` or a tuple like it, to write to, contiguous, None for the fields that this call has not.

    Returns:
        `NormSelection`: the fields of `NormScore`, then those of `Selection`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, stride, device or range, or for
            arguments that exclude each other.
        orthorank_kernels.dispatch.BackendError: ``backend="triton"`` cannot run here.

    Example:
        >>> import torch
        >>> from orthorank_kernels import rms_norm_select
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, -0.5]]])
        >>> rms_norm_select(x, torch.ones(2), 1e-6, k=2).positions
        tensor([[1, 2]], dtype=torch.int32)

        The same tokens as two packed sequences; whatever scores less than 1.45 against a stored sink is selected:

        >>> sink, cu_seqlens = torch.tensor([1.4, 0.0]), torch.tensor([0, 3, 4], dtype=torch.int32)
        >>> picked = rms_norm_select(x[0], None, 1e-6, threshold=1.45, sink=sink, cu_seqlens=cu_seqlens, max_selected=3)
        >>> picked.scores
        tensor([1.9799, 1.4000, 0.0000, 1.7709])
        >>> picked.rows, picked.counts
        (tensor([ 1,  2, -1], dtype=torch.int32), tensor([2, 0], dtype=torch.int32))
    """
    check_norm(hidden_states, weight, residual, norm, bias, weight_offset, score, sink, starts, lengths, cu_seqlens)
    check_numbers(eps, weight_offset, write_norm, copy_input)
    if out is not None and (not isinstance(out, (tuple, list)) or len(out) != len(NormSelection._fields)):
        raise TypeError(f"out is {_checks.kind_of(out)}; it must be a tuple ({', '.join(NormSelection._fields)})")
    request = select_request(
        hidden_states,
        k,
        threshold,
        starts,
        lengths,
        sink_positions,
        cu_seqlens,
        position_offsets,
        keep_last,
        max_selected,
        None if out is None else out[3:],
    )
    if position_offsets is not None and sink is None:
        raise ValueError(
            "position_offsets was given without sink: a sequence that goes on has its sink before these tokens; pass "
            "the stored normed state of each sequence's sink, [hidden] or [seqs, hidden]"
        )
    if out is not None:
        check_norm_out(out[:3], hidden_states, residual, norm, write_norm, copy_input)
    if workspace is not None:
        _check_workspace(workspace, hidden_states, cu_seqlens)
    results = dispatch.run(
        _NORM_SELECT,
        (
            hidden_states,
            weight,
            eps,
            residual,
            norm,
            bias,
            weight_offset,
            score,
            sink,
            write_norm,
            copy_input,
            *request,
            workspace,
        ),
        backend=backend,
        device=hidden_states.device,
        out=None if out is None else tuple(out),
    )
    scored = norm_result(hidden_states, residual, norm, write_norm, copy_input, *results[:3])
    selected = select_result(cu_seqlens, *results[3:])
    return NormSelection(
        scored.normed,
        scored.scores,
        scored.residual,
        selected.positions,
        selected.counts,
        selected.rows,
        selected.cu_selected,
    )


def _check_workspace(workspace: Tensor, hidden_states: Tensor, cu_seqlens: Tensor | None) -> None:
    _checks.tensor("workspace", workspace, "[n]", (torch.int32,))
    rows = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if workspace.shape[0] < max(rows, 1):
        raise ValueError(
            f"workspace has shape {list(workspace.shape)}; it must have at least {max(rows, 1)} entries, one for each "
            "row or sequence"
        )
    _checks.unit_last_stride(workspace=workspace)
    _checks.same_device("hidden_states", hidden_states, workspace=workspace)
    if _checks.readable(workspace) and workspace.any():
        raise ValueError("workspace holds numbers other than 0, which the kernel would count on from: pass zeros")


def _fake(call: Any) -> tuple[Tensor, ...]:
    return (
        *norm_outputs(call.hidden_states, call.residual, call.norm, call.write_norm, call.copy_input),
        *selection_outputs(call.hidden_states, call.width, call.cu_seqlens),
    )


# The workspace is as it was after the call, so for a compiler nothing is written to it.
_NORM_SELECT: Any = _library.define(
    pytorch.rms_norm_select,
    reference=reference.rms_norm_select,
    triton="norm_selection.rms_norm_select",
    fake=_fake,
    outputs=("normed?", "scores", "summed?", *OUTPUTS),
)
