"""Norm, score and selection, one after the other."""

from torch import Tensor

from orthorank_kernels.pytorch.scoring import rms_norm_score
from orthorank_kernels.pytorch.selection import select_tokens


def rms_norm_select(
    hidden_states: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    norm: str,
    bias: Tensor | None,
    weight_offset: float,
    score: str,
    sink: Tensor | None,
    write_norm: bool,
    copy_input: bool,
    k: int | None,
    seq_k: Tensor | None,
    threshold: float | None,
    seq_threshold: Tensor | None,
    width: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    sink_positions: Tensor | None,
    cu_seqlens: Tensor | None,
    position_offsets: Tensor | None,
    keep_last: int,
    workspace: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``normed``, ``scores``, the summed states, ``positions``, ``counts``, ``rows`` and ``cu_selected``.

    `orthorank_kernels.rms_norm_select`; the ``workspace`` is the kernel's.
    """
    states = (hidden_states, weight, eps, residual, norm, bias, weight_offset, score, sink, starts, cu_seqlens)
    normed, scores, summed = rms_norm_score(*states, write_norm, copy_input)
    of_rows = (starts, lengths, sink_positions, cu_seqlens, position_offsets, keep_last)
    return normed, scores, summed, *select_tokens(scores, k, seq_k, threshold, seq_threshold, width, *of_rows)
