"""The score that ranks tokens: the paper's, and those it is compared with."""

from typing import Any

from torch import Tensor

from orthorank_kernels import rms_norm_score, rms_norm_select, select_tokens


def norm_and_select(
    criterion: str, hidden_states: Tensor, weight: Tensor, eps: float, **request: Any
) -> tuple[Any, ...]:
    """The input norm of all tokens, and the tokens that ``criterion`` selects.

    Args:
        criterion: ``"orthogonal"``: smallest ``|<x_0, x_i>|`` (equation 4); ``"inverse"``: largest (Figure 4).
        hidden_states: ``[batch, tokens, hidden]``; weight: ``[hidden]``; eps: of the norm.
        request: k, sink, starts, lengths, sink_positions, keep_last, max_selected, as for `rms_norm_select`.

    Returns:
        normed ``[batch, tokens, hidden]``, positions int32 ``[batch, max_selected]``. The sink ranks last in both.
    """
    if criterion == "orthogonal":
        selection = rms_norm_select(hidden_states, weight, eps, **request)
        return selection.normed, selection.positions
    sink, starts, lengths = request.pop("sink", None), request.get("starts"), request.get("lengths")
    result = rms_norm_score(hidden_states, weight, eps, sink=sink, starts=starts, lengths=lengths)
    return result.normed, select_tokens(-result.scores, **request).positions
