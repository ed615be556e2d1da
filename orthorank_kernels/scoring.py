"""RMSNorm fused with the score against the attention sink."""

from typing import Any

import torch
from torch import Tensor

from orthorank_kernels import _checks, _library, dispatch
from orthorank_kernels.reference import scoring as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm_score(
    hidden_states: Tensor,
    weight: Tensor,
    eps: float,
    *,
    sink: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm every token and score it by how far it is from orthogonal to the sink, in one pass.

    ``normed_i = weight * (x_i / sqrt(mean(x_i^2) + eps))`` and ``score_i = |<sink, normed_i>|``: equations 3 and 4 of
    the OrthoRank paper, on the normalised states. A small score marks an important token. The norm rounds exactly
    where Hugging Face's ``LlamaRMSNorm`` does: float32 inside, then to the dtype, then times ``weight`` in the dtype.

    Args:
        hidden_states: ``[batch, tokens, hidden]``, float32, float16 or bfloat16, the last stride 1; any ``hidden``.
        weight: ``[hidden]``, the norm's weight, same dtype.
        eps: added to the mean of squares.
        sink: the sink token's stored *normalised* state, ``[batch, hidden]`` or ``[hidden]``, in the dtype of
            ``hidden_states`` or float32. None: the normalised first valid token of each row.
        starts: int32 ``[batch]``, each row's first valid token (left padding). None: 0.
        lengths: int32 ``[batch]``, valid tokens of each row. No score depends on it; the argument is there so that
            the batch-layout ops can be called alike.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``normed``, like ``hidden_states`` (contiguous), and ``scores``, float32 ``[batch, tokens]``. Padding tokens
        are normed and scored like the others; `select_tokens` ignores them. Nothing is set to infinity here.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, stride or device.
        orthorank_kernels.dispatch.BackendError: ``backend="triton"`` cannot run here.

    Example:
        >>> import torch
        >>> from orthorank_kernels import rms_norm_score
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
        >>> normed, scores = rms_norm_score(x, torch.ones(2), 0.0)
        >>> scores
        tensor([[2.0000, 0.0000, 1.4142]])
    """
    sink = check_norm(hidden_states, weight, sink, starts, lengths)
    return dispatch.run(
        _OP,
        (hidden_states, weight, eps, sink, starts),
        backend=backend,
        device=hidden_states.device,
    )


def check_norm(
    hidden_states: Tensor, weight: Tensor, sink: Tensor | None, starts: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """Check the arguments of the norm and the score; returns the sink as ``[batch, hidden]``."""
    _checks.tensor("hidden_states", hidden_states, "[batch, tokens, hidden]", DTYPES)
    batch, _, hidden = hidden_states.shape
    if hidden == 0:
        raise ValueError("hidden_states has hidden size 0; it must be at least 1")
    _checks.unit_last_stride(hidden_states=hidden_states)
    _checks.tensor("weight", weight, "[hidden]", DTYPES)
    _checks.shape("weight", weight, [hidden], "hidden_states")
    _checks.unit_last_stride(weight=weight)
    _checks.same_dtype("hidden_states", hidden_states, weight=weight)
    if sink is not None:
        sink = _check_sink(sink, hidden_states)
    _checks.same_device("hidden_states", hidden_states, weight=weight, sink=sink)
    for name, value in (("starts", starts), ("lengths", lengths)):
        if value is not None:
            _checks.row_index(name, value, batch, hidden_states)
    return sink


def _check_sink(sink: Tensor, hidden_states: Tensor) -> Tensor:
    batch, _, hidden = hidden_states.shape
    dtypes = dict.fromkeys((hidden_states.dtype, torch.float32))
    one_for_all = isinstance(sink, Tensor) and sink.dim() == 1
    _checks.tensor("sink", sink, "[hidden]" if one_for_all else "[batch, hidden]", tuple(dtypes))
    if one_for_all:
        sink = sink.unsqueeze(0).expand(batch, -1)
    _checks.shape("sink", sink, [batch, hidden], "hidden_states")
    _checks.unit_last_stride(sink=sink)
    return sink


def _fake(
    hidden_states: Tensor, weight: Tensor, eps: float, sink: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    normed = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    return normed, hidden_states.new_empty(hidden_states.shape[:2], dtype=torch.float32)


_OP: Any = _library.define(
    "rms_norm_score(Tensor hidden_states, Tensor weight, float eps, Tensor? sink, Tensor? starts) -> (Tensor, Tensor)",
    cpu=reference.rms_norm_score,
    triton="scoring.rms_norm_score",
    fake=_fake,
)
