"""The norm, with the residual add before it, fused with the score against the attention sink."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.layout import norm_outputs
from orthorank_kernels.pytorch import scoring as pytorch
from orthorank_kernels.reference import selection as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMS = ("rms", "layer", "identity")
SCORES = ("inner", "cosine")


class NormScore(NamedTuple):
    """Result of `rms_norm_score`; a field that was not asked for is None."""

    normed: Tensor | None
    scores: Tensor
    residual: Tensor | None


@planned
def rms_norm_score(
    hidden_states: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    norm: str = "rms",
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    score: str = "inner",
    sink: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    write_norm: bool = True,
    copy_input: bool = False,
    out: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> NormScore:
    """Norm every token and score it by how far it is from orthogonal to the sink, in one pass over the hidden states.

    With ``h_i = hidden_states_i + residual_i``, ``normed_i = weight * (h_i / sqrt(mean(h_i^2) + eps))`` and
    ``score_i = |<sink, normed_i>|``: equations 3 and 4 of the OrthoRank paper, on the normalised states. A small score
    marks an important token. float32 inside; values round where Hugging Face's models round them:

    ============== ================= ===================================================================
    ``norm``       as                rounds to the dtype of ``hidden_states``
    ============== ================= ===================================================================
    ``"rms"``      ``LlamaRMSNorm``  before the product with ``weight`` and after it
    ``"rms"``      ``GemmaRMSNorm``  once, after the product with ``weight_offset + weight`` (offset not 0)
    ``"layer"``    ``F.layer_norm``  once, after the product with ``weight_offset + weight`` and the sum with ``bias``
    ``"identity"`` no norm           never: the score is that of ``h``
    ============== ================= ===================================================================

    The sum with ``residual`` is rounded before it is normed, and the score is taken of the rounded ``normed``.

    Args:
        hidden_states: ``[batch, tokens, hidden]``, or packed ``[total, hidden]`` with ``cu_seqlens``; float32, float16
            or bfloat16, the last stride 1; any ``hidden``.
        weight: ``[hidden]``, the norm's weight, same dtype. None: ones. ``"identity"`` takes neither weight nor bias.
        eps: added to the mean of squares, or to the variance.
        residual: what is added first, shape and dtype of ``hidden_states``, the last stride 1.
        norm: see above.
        bias: ``[hidden]``, same dtype, with ``"layer"`` alone.
        weight_offset: added to the weight in float32; Gemma's weights are used as 1 + weight.
        score: ``"inner"``, or ``"cosine"``: divided by the lengths of both vectors, each at least 1e-8.
        sink: the sink token's stored *normed* state: one for each sequence, ``[batch, hidden]``, or one for all,
            ``[hidden]``; in the dtype of ``hidden_states`` or float32. None: the normed first valid token of each.
        starts: int32 ``[batch]``, each row's first valid token (left padding). None: 0. Not with ``cu_seqlens``.
        lengths: int32 ``[batch]``, valid tokens of each row. No score depends on it; the argument is there so that
            the batch-layout ops can be called alike. Not with ``cu_seqlens``.
        cu_seqlens: int32 ``[sequences + 1]``, where each sequence of a packed batch begins, and ``total`` at the end.
            Sequences may be empty. The values are not read on the host. Where the end is below ``total`` (a captured
            graph), results of the tokens past it mean nothing.
        write_norm: False: scores (and the residual) alone; ``normed`` is None and nothing is written for it.
        copy_input: return a plain copy of ``hidden_states`` as ``residual`` when no ``residual`` is given.
        out: ``(normed, scores, residual)`` to write to, of the shapes that are returned, contiguous, None where
            nothing is written. It may not overlap the inputs.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        `NormScore`: ``normed``, like ``hidden_states`` (contiguous; for ``"identity"`` it is the sum, or
        ``hidden_states`` itself), ``scores``, float32 ``[batch, tokens]`` or ``[total]``, and ``residual``, the sum (or
        the copy), contiguous. Padding tokens are normed and scored like the others; `select_tokens` ignores them.
        Nothing is set to infinity here.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, stride or device, or for arguments that
            exclude each other.
        orthorank_kernels.dispatch.BackendError: ``backend="triton"`` cannot run here.

    Example:
        >>> import torch
        >>> from orthorank_kernels import rms_norm_score
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
        >>> rms_norm_score(x, torch.ones(2), 0.0).scores
        tensor([[2.0000, 0.0000, 1.4142]])

        Two packed sequences of a layer whose input is a sum, each with its own sink; only the scores are wanted:

        >>> x, added = torch.ones(3, 2), torch.tensor([[0.0, 0.0], [-1.0, 1.0], [0.0, -2.0]])
        >>> cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
        >>> sinks = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> result = rms_norm_score(
        ...     x, None, 1e-5, residual=added, norm="identity", score="cosine", sink=sinks, cu_seqlens=cu_seqlens
        ... )
        >>> result.scores
        tensor([0.7071, 0.0000, 0.7071])
        >>> result.residual
        tensor([[ 1.,  1.],
                [ 0.,  2.],
                [ 1., -1.]])
    """
    check_norm(hidden_states, weight, residual, norm, bias, weight_offset, score, sink, starts, lengths, cu_seqlens)
    check_numbers(eps, weight_offset, write_norm, copy_input)
    if out is not None:
        out = check_norm_out(out, hidden_states, residual, norm, write_norm, copy_input)
    normed, scores, summed = dispatch.run(
        _OP,
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
            starts,
            cu_seqlens,
            write_norm,
            copy_input,
        ),
        backend=backend,
        device=hidden_states.device,
        out=out,
    )
    return norm_result(hidden_states, residual, norm, write_norm, copy_input, normed, scores, summed)


def norm_result(
    hidden_states: Tensor,
    residual: Tensor | None,
    norm: str,
    write_norm: bool,
    copy_input: bool,
    normed: Tensor | None,
    scores: Tensor,
    summed: Tensor | None,
) -> NormScore:
    """What an op with a norm returns, from what its operator returned."""
    if norm == "identity":
        normed = hidden_states if residual is None else summed
    return NormScore(normed if write_norm else None, scores, summed if residual is not None or copy_input else None)


def check_numbers(eps: float, weight_offset: float, write_norm: bool, copy_input: bool) -> None:
    """Check the numbers and flags of the norm."""
    _checks.number("eps", eps, at_least=0)
    _checks.number("weight_offset", weight_offset)
    _checks.flag("write_norm", write_norm)
    _checks.flag("copy_input", copy_input)


def check_norm(
    hidden_states: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    norm: str,
    bias: Tensor | None,
    weight_offset: float,
    score: str,
    sink: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check the arguments of the norm and the score, in either layout."""
    layout = "[batch, tokens, hidden]" if cu_seqlens is None else "[total, hidden]"
    hints = {2: _checks.PACKED_NEEDS} if cu_seqlens is None else {}
    _checks.tensor("hidden_states", hidden_states, layout, DTYPES, hints=hints)
    hidden = hidden_states.shape[-1]
    if hidden == 0:
        raise ValueError("hidden_states has hidden size 0; it must be at least 1")
    _checks.unit_last_stride(hidden_states=hidden_states)
    _checks.choice("norm", norm, NORMS)
    _checks.choice("score", score, SCORES)
    _check_vectors(hidden_states, weight, bias, norm, weight_offset)
    if residual is not None:
        _checks.tensor("residual", residual, layout, DTYPES)
        _checks.shape("residual", residual, list(hidden_states.shape), "hidden_states")
        _checks.unit_last_stride(residual=residual)
        _checks.same_dtype("hidden_states", hidden_states, residual=residual)
    _checks.same_device("hidden_states", hidden_states, residual=residual)
    if cu_seqlens is not None:
        _check_packed(cu_seqlens, hidden_states, starts, lengths)
        sequences = cu_seqlens.shape[0] - 1
    else:
        sequences = hidden_states.shape[0]
    for name, value in (("starts", starts), ("lengths", lengths)):
        if value is not None:
            _checks.row_index(name, value, sequences, hidden_states)
    if sink is not None:
        _check_sink(sink, hidden_states, sequences, "[batch, hidden]" if cu_seqlens is None else "[sequences, hidden]")


def _check_vectors(
    hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, weight_offset: float
) -> None:
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if norm == "identity" or (norm == "rms" and name == "bias"):
            takes = "weight and no bias" if norm == "identity" else 'bias; pass norm="layer" for a LayerNorm'
            raise ValueError(f"{name} was given with norm={norm!r}, which takes no {takes}")
        _checks.tensor(name, vector, "[hidden]", DTYPES)
        _checks.shape(name, vector, [hidden_states.shape[-1]], "hidden_states")
        _checks.unit_last_stride(**{name: vector})
        _checks.same_dtype("hidden_states", hidden_states, **{name: vector})
    _checks.same_device("hidden_states", hidden_states, weight=weight, bias=bias)
    if weight is None and weight_offset != 0:
        raise ValueError(f"weight_offset is {weight_offset} without a weight that it could be added to")


def _check_packed(cu_seqlens: Tensor, hidden_states: Tensor, starts: Tensor | None, lengths: Tensor | None) -> None:
    for name, value in (("starts", starts), ("lengths", lengths)):
        if value is not None:
            raise ValueError(f"{name} was given with cu_seqlens, which says where each sequence begins and ends")
    _checks.tensor("cu_seqlens", cu_seqlens, "[sequences + 1]", (torch.int32,))
    if cu_seqlens.shape[0] < (1 if hidden_states.shape[0] == 0 else 2):
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [sequences + 1], from 0 to the number of tokens"
        )
    _checks.unit_last_stride(cu_seqlens=cu_seqlens)
    _checks.same_device("hidden_states", hidden_states, cu_seqlens=cu_seqlens)
    _checks.boundaries("cu_seqlens", cu_seqlens, hidden_states.shape[0], "hidden_states")


def _check_sink(sink: Tensor, hidden_states: Tensor, sequences: int, layout: str) -> None:
    hidden = hidden_states.shape[-1]
    dtypes = dict.fromkeys((hidden_states.dtype, torch.float32))
    one_for_all = isinstance(sink, Tensor) and sink.dim() == 1
    _checks.tensor("sink", sink, "[hidden]" if one_for_all else layout, tuple(dtypes))
    _checks.shape("sink", sink, [hidden] if one_for_all else [sequences, hidden], "hidden_states")
    _checks.unit_last_stride(sink=sink)
    _checks.same_device("hidden_states", hidden_states, sink=sink)


def check_norm_out(
    out: Sequence[Tensor | None],
    hidden_states: Tensor,
    residual: Tensor | None,
    norm: str,
    write_norm: bool,
    copy_input: bool,
) -> tuple[Tensor | None, ...]:
    """Check ``out``: what is written needs a tensor, the rest None."""
    names = NormScore._fields
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise TypeError(f"out is {_checks.kind_of(out)}; it must be a tuple ({', '.join(names)})")
    shape = hidden_states.shape
    wanted = (write_norm and norm != "identity", True, residual is not None or copy_input)
    for name, tensor, is_written in zip(names, out, wanted, strict=True):
        if not is_written:
            if tensor is not None:
                raise ValueError(f"out.{name} was given, but this call writes no {name}; pass None")
            continue
        is_score = name == "scores"
        _checks.output(
            f"out.{name}",
            tensor,
            shape[:-1] if is_score else shape,
            torch.float32 if is_score else hidden_states.dtype,
            hidden_states,
        )
    return tuple(out)


def _fake(call: Any) -> tuple[Tensor, ...]:
    return norm_outputs(call.hidden_states, call.residual, call.norm, call.write_norm, call.copy_input)


_OP: Any = _library.define(
    pytorch.rms_norm_score,
    reference=reference.rms_norm_score,
    triton="scoring.rms_norm_score",
    fake=_fake,
    outputs=("normed?", "scores", "summed?"),  # an operator has no two arguments of one name
)
