"""A corrected layer: what its map puts back into the tokens that the layer leaves out.

    h' = h + up (down x) + bias

for every token that is not selected, x being its normed state, except the sink and padding. The map sees one token
alone, so nothing here depends on chunks, batches or padding. Where a layer is removed, every token is left out, prompt
or generated, but the sink.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from orthorank.calls.call import Call
from orthorank.config import OrthoRankConfig
from orthorank.correction import LayerMap


def map_of(plan: OrthoRankConfig, layer: int, device: torch.device) -> LayerMap | None:
    """The map of ``layer`` in float32 on ``device`` (the CPU for "meta", where offloaded weights wait), or None."""
    if plan.correction is None or layer not in plan.correction.maps:
        return None
    place = torch.device("cpu") if device.type == "meta" else device
    with torch.inference_mode(False):  # else a plan that is applied inside it could have no gradient elsewhere
        return LayerMap(*(part.to(place, torch.float32, copy=True) for part in plan.correction.maps[layer]))


def on(layer_map: LayerMap, device: torch.device) -> LayerMap:
    """``layer_map`` on ``device``; the same one where it is there already."""
    if layer_map.down.device == device:
        return layer_map
    return LayerMap(*(part.to(device) for part in layer_map))


def corrected(hidden_states: Tensor, normed: Tensor, call: Call, layer_map: LayerMap) -> Tensor:
    """A new tensor: ``hidden_states`` with what the map adds to each token that may be left out.

    Both products and both sums are in float32 (in float64, if the states are); the sum is rounded once.

    Args:
        hidden_states, normed: ``[batch, tokens, hidden]``, before and after the layer's input norm.
        call: where sinks and padding are; these stay as they are.
    """
    down, up, bias = layer_map
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    added = linear(linear(normed.to(dtype), down.to(dtype)), up.to(dtype), bias.to(dtype))
    result = (hidden_states.to(dtype) + added.to(hidden_states.device)).to(hidden_states.dtype)
    may = may_be_left_out(call, hidden_states.device)
    return result if may is None else torch.where(may[..., None], result, hidden_states)


def may_be_left_out(call: Call, device: torch.device) -> Tensor | None:
    """Which tokens are neither sinks nor padding: bool ``[batch or 1, tokens]``; None: all of them."""
    column = torch.arange(call.tokens, device=device)[None]
    may = None
    if call.sink_positions is not None:
        may = column != call.sink_positions[:, None]
    elif call.first:
        may = column != 0
    if may is None or call.starts is None or call.lengths is None:
        return may
    start = call.starts[:, None]
    return may & (column >= start) & (column < start + call.lengths[:, None])
