"""The score that ranks tokens: the paper's, and those it is compared with."""

from typing import Any

from torch import Tensor

from orthorank_kernels import rms_norm_score, rms_norm_select, select_tokens


def norm_and_select(
    criterion: str, hidden_states: Tensor, norm: dict[str, Any], **request: Any
) -> tuple[Any, Any, Any]:
    """The input norm of all tokens, and the tokens that ``criterion`` selects.

    Args:
        criterion: ``"orthogonal"``: smallest ``|<x_0, x_i>|`` (equation 4); ``"inverse"``: largest (Figure 4).
        hidden_states: ``[batch, tokens, hidden]``.
        norm: weight, eps, norm, bias and weight_offset of the layer's input norm, as for `rms_norm_select`.
        request: k, sink, starts, lengths, sink_positions, keep_last, max_selected, workspace, as for `rms_norm_select`.

    Returns:
        normed ``[batch, tokens, hidden]``, positions int32 ``[batch, max_selected]``, and a copy of ``hidden_states``.
        The sink ranks last in both.
    """
    if criterion == "orthogonal":
        chosen = rms_norm_select(hidden_states, copy_input=True, **norm, **request)
        return chosen.normed, chosen.positions, chosen.residual
    del request["workspace"]
    sink, starts, lengths = request.pop("sink", None), request.get("starts"), request.get("lengths")
    scored = rms_norm_score(hidden_states, sink=sink, starts=starts, lengths=lengths, copy_input=True, **norm)
    return scored.normed, select_tokens(-scored.scores, **request).positions, scored.residual
