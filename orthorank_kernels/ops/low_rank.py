"""A low-rank map added to hidden states: what a corrected layer puts back into the tokens that it leaves out."""

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.ops.selection import check_sequences
from orthorank_kernels.pytorch import low_rank as pytorch
from orthorank_kernels.reference import rows as reference


@planned
def add_low_rank(
    hidden_states: Tensor,
    low: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add a low-rank map to every token but the sink: ``out[t] = hidden_states[t] + up @ low[t] + bias``.

    The end of a corrected layer: ``low`` is ``down @ x`` of the normed states x, which may be columns of the product
    that gives keys and values, with ``down`` as further rows of its weight. The copy of the hidden states that a layer
    writes its selected tokens into is the result. Sinks and padding are copied as they are.

    Products and sums are float32, and the sum is rounded once.

    Args:
        hidden_states: ``[batch, tokens, hidden]``, or packed ``[total, hidden]`` with ``cu_seqlens``, floating point.
            Any strides, the last one 1.
        low: ``[batch, tokens, rank]`` or ``[total, rank]``, dtype of ``hidden_states``. Any strides, the last one 1.
        up: ``[hidden, rank]``, that dtype; bias: ``[hidden]``, that dtype, or None.
        starts: int32 ``[batch]``, each row's first valid token. None: 0. Batch layout.
        lengths: int32 ``[batch]``, number of valid tokens from there. None: the rest of the row. Batch layout.
        sink_positions: int32 ``[batch]``, where each row's sink is, or ``[seqs]``, counted from the beginning of the
            sequence; -1 = not among these tokens. None: the first valid token.
        cu_seqlens: int32 ``[seqs + 1]``, from 0, never falling, to the number of tokens; tokens past the last entry
            belong to no sequence. Selects the packed layout.
        out: where to write the result: its shape and dtype, contiguous; it may be ``hidden_states`` itself. None: new
            memory.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        Shape and dtype of ``hidden_states``, contiguous; ``out`` if it is given. Differentiable in all floating inputs.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device.
        BackendError: ``backend="triton"`` cannot run here, or ``out`` is given and an input requires grad.

    >>> hidden_states, low = torch.zeros(1, 3, 2), torch.tensor([[[9.0], [1.0], [2.0]]])
    >>> add_low_rank(hidden_states, low, torch.tensor([[1.0], [10.0]]), torch.tensor([0.5, 0.0]))
    tensor([[[ 0.0000,  0.0000],
             [ 1.5000, 10.0000],
             [ 2.5000, 20.0000]]])
    """
    packed = cu_seqlens is not None
    hints = {} if packed else {2: _checks.PACKED_NEEDS}
    layout = "[total, hidden]" if packed else "[batch, tokens, hidden]"
    _checks.tensor("hidden_states", hidden_states, layout, hints=hints)
    _checks.tensor("low", low, "[total, rank]" if packed else "[batch, tokens, rank]")
    _checks.shape("low", low, (*hidden_states.shape[:-1], low.shape[-1]), "hidden_states, before the rank,")
    if low.shape[-1] == 0:
        raise ValueError(f"low has shape {list(low.shape)}; its last dimension, the rank, must be at least 1")
    _checks.tensor("up", up, "[hidden, rank]")
    _checks.shape("up", up, (hidden_states.shape[-1], low.shape[-1]), "the shape of hidden_states and low")
    if bias is not None:
        _checks.tensor("bias", bias, "[hidden]")
        _checks.shape("bias", bias, hidden_states.shape[-1:], "the shape of hidden_states")
        _checks.unit_last_stride(bias=bias)
    _checks.same_dtype("hidden_states", hidden_states, low=low, up=up, bias=bias)
    _checks.same_device("hidden_states", hidden_states, low=low, up=up, bias=bias)
    _checks.unit_last_stride(hidden_states=hidden_states, low=low, up=up)
    rows = hidden_states.shape[0]
    if cu_seqlens is not None:
        rows = check_sequences(cu_seqlens, hidden_states, starts=starts, lengths=lengths)
    indices = {"starts": starts, "lengths": lengths, "sink_positions": sink_positions}
    for name, value in indices.items():
        if value is not None:
            _checks.row_index(name, value, rows, hidden_states)
    if out is not None:
        _checks.output("out", out, hidden_states.shape, hidden_states.dtype, hidden_states)
    states = [None if t is None else t.unsqueeze(0) if packed else t for t in (hidden_states, low, out)]
    result = dispatch.run(
        _ADD_LOW_RANK,
        (*states[:2], up, bias, *indices.values(), cu_seqlens),
        backend=backend,
        device=hidden_states.device,
        out=None if out is None else (states[2],),
    )
    if out is not None:
        return out
    return result.squeeze(0) if packed else result


_ADD_LOW_RANK = _library.define(
    pytorch.add_low_rank,
    reference=reference.add_low_rank,
    triton="low_rank.add_low_rank",
    fake=lambda call: torch.empty_like(call.hidden_states, memory_format=torch.contiguous_format),
    outputs=("out",),
    aliases=("hidden_states",),
)
