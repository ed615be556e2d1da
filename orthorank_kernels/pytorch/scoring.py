"""Residual add, norm and sink score, in PyTorch.

h_i      = x_i + residual_i
normed_i = norm(h_i) * weight + bias
score_i  = |<sink, normed_i>|, or |cos(sink, normed_i)|
"""

import torch
from torch import Tensor

from orthorank_kernels.reference.norms import normalise, wide

SHORTEST = 1e-8  # what lengths are clamped to in a cosine, as in torch.nn.functional.cosine_similarity


def sequence_of_tokens(cu_seqlens: Tensor, total: int) -> Tensor:
    """Which sequence of a packed batch each token belongs to: int64 ``[total]``."""
    tokens = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).clamp(max=cu_seqlens.shape[0] - 2)


def rms_norm_score(
    hidden_states: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    norm: str = "rms",
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    score: str = "inner",
    sink: Tensor | None = None,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    write_norm: bool = True,
    copy_input: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normed``, ``scores`` and the summed (or copied) hidden states; `orthorank_kernels.rms_norm_score`.

    What is not asked for, and ``normed`` of ``"identity"``, is an empty tensor.
    """
    h = hidden_states if residual is None else hidden_states + residual
    normed = h if norm == "identity" else normalise(h, weight, eps, norm, bias, weight_offset)
    scores = sink_scores(normed, score, sink, starts, cu_seqlens)
    return (  # an operator's outputs have memory of their own, empty ones too
        normed.contiguous() if write_norm and norm != "identity" else hidden_states.new_empty(0),
        scores,
        h.clone(memory_format=torch.contiguous_format)
        if residual is not None or copy_input
        else hidden_states.new_empty(0),
    )


def sink_scores(
    normed: Tensor, score: str, sink: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """How far each token is from orthogonal to its sink: ``[batch, tokens]`` or ``[total]``."""
    # Products are taken with the rounded values: they are what the projections and a stored sink see.
    values = normed.to(wide(normed.dtype))
    if values.numel() == 0:
        return values.sum(-1)
    if cu_seqlens is None:
        sink = _first_valid(values, starts) if sink is None else sink.to(values.dtype)
        products = torch.matmul(values, sink.unsqueeze(-1)).squeeze(-1)
    else:
        sequence = sequence_of_tokens(cu_seqlens, values.shape[0])
        if sink is None:
            sink = values[cu_seqlens[sequence].long()]
        elif sink.dim() == 2:
            sink = sink[sequence]
        sink = sink.to(values.dtype)  # of each token, or of all
        products = (values * sink).sum(-1)
    if score == "inner":
        return products.abs()
    sink_length = torch.linalg.vector_norm(sink, dim=-1).clamp(min=SHORTEST)
    if cu_seqlens is None and sink.dim() == 2:
        sink_length = sink_length.unsqueeze(-1)  # [batch, 1]
    return products.abs() / (sink_length * torch.linalg.vector_norm(values, dim=-1).clamp(min=SHORTEST))


def _first_valid(rows: Tensor, starts: Tensor | None) -> Tensor:
    if starts is None:
        return rows[:, 0]
    first = starts.clamp(0, rows.shape[1] - 1).long()
    return rows[torch.arange(rows.shape[0], device=rows.device), first]
