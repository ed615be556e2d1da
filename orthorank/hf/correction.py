"""A corrected layer: what its map puts back into the tokens that the layer leaves out.

    h' = h + up (down x) + bias

for every token that is not selected, x being its normed state, except the sink and padding. The map sees one token
alone, so nothing here depends on chunks, batches or padding. Where a layer is removed, every token is left out, prompt
or generated, but the sink.

Two launches, the product with ``down`` and `add_low_rank`, whose result is the copy of the hidden states that the layer
writes its selected tokens into: without a map another op makes it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from orthorank.calls.context import ForwardContext
from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.correction import LayerMap
from orthorank.families.norm import Norm
from orthorank_kernels import add_low_rank, rms_norm_score

if TYPE_CHECKING:
    from orthorank.families import Family


def map_of(plan: OrthoRankConfig, layer: int, device: torch.device, dtype: torch.dtype) -> LayerMap | None:
    """The map of ``layer`` on ``device`` (the CPU for "meta", where offloaded weights wait), or None.

    Args:
        plan: a corrected one or not. layer: its number. device: where the layer runs.
        dtype: of the hidden states.

    Raises:
        OrthoRankError: a number of the map is too large for ``dtype``.
    """
    if plan.correction is None or layer not in plan.correction.maps:
        return None
    place = torch.device("cpu") if device.type == "meta" else device
    with torch.inference_mode(False):  # else a plan that is applied inside it could have no gradient elsewhere
        found = LayerMap(*(part.to(dtype=dtype, copy=True) for part in plan.correction.maps[layer]))
        if not all(bool(part.isfinite().all()) for part in found):
            raise OrthoRankError(
                f"the map of layer {layer} holds numbers that {str(dtype).removeprefix('torch.')} does not; run the "
                "model in bfloat16 or float32, or fit the maps of this plan again"
            )
        return LayerMap(*(part.to(place) for part in found))


def on(layer_map: LayerMap, device: torch.device, dtype: torch.dtype | None = None) -> LayerMap:
    """``layer_map`` on ``device``, in ``dtype`` if one is given; the same one where it is that already."""
    if layer_map.down.device == device and dtype in (None, layer_map.down.dtype):
        return layer_map
    return LayerMap(*(part.to(device, dtype) for part in layer_map))


def corrected(hidden_states: Tensor, normed: Tensor, call: ForwardContext, layer_map: LayerMap) -> Tensor:
    """A new tensor: ``hidden_states`` with what the map adds to each token that may be left out.

    The products are of the hidden states' dtype and summed in float32 (float64, if the states are); the sum is rounded
    once.

    Args:
        hidden_states, normed: ``[batch, tokens, hidden]``, before and after the layer's input norm.
        call: where sinks and padding are; these stay as they are.
    """
    down, up, bias = on(layer_map, hidden_states.device, hidden_states.dtype)
    low = linear(normed.to(hidden_states), down).to(hidden_states.dtype)  # autocast may have made it another
    assert call.first or call.sink_positions is not None  # None is the first token to the op; see `read_call`
    return add_low_rank(
        hidden_states, low, up, bias, starts=call.starts, lengths=call.lengths, sink_positions=call.sink_positions
    )


def normed_of(family: "Family", layer: Any, hidden_states: Tensor) -> Tensor:
    """What the input norm of ``layer``, which is removed, makes of ``hidden_states``; called where kernels do not."""
    norm = Norm.of(family, layer, family.input_norm)
    if hidden_states.dtype == torch.float64:
        return norm(hidden_states)
    with norm.applied(hidden_states) as (normed, how):
        if normed is not None:
            return normed
        scored: Any = rms_norm_score(hidden_states, **how)
        return scored.normed
