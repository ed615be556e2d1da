"""vLLM's decoder layers that a plan removes: nothing is left of them but the map of a corrected one."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from orthorank.serving.vllm import maps
from orthorank.serving.vllm_interface.interface import OBJECTS, expect
from orthorank_kernels import add_low_rank


class RemovedLayer(nn.Module):
    """What the class of a layer with keep ratio 0 is mixed with: nothing is computed, nothing is cached."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any) -> Any:
        """Both as they came."""
        return hidden_states, residual


class CorrectedRemovedLayer(nn.Module):
    """The same with a map, which every token gets but the sink, prompt or generated: nothing is cached.

    A request's sink is at position 0, so this asks nothing of the step: it is part of the compiled graph.
    """

    input_layernorm: Any

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any) -> Any:
        """Nothing new in the first, the corrected residual stream in the second."""
        if residual is None:  # the model's first layer
            normed, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            normed, residual = self.input_layernorm(hidden_states, residual)
        layer_map = maps.held(self)
        assert layer_map is not None
        low = linear(normed, layer_map.down)
        nowhere = torch.full((1,), -1, dtype=torch.int32, device=low.device)
        added = add_low_rank(residual[None], low[None], layer_map.up, layer_map.bias, sink_positions=nowhere)[0]
        stream = torch.where(positions[:, None] == 0, residual, added)
        return torch.zeros_like(stream), stream


def make_removed(layer: Any, contexts: dict[str, Any], *, corrected: bool) -> None:
    """Turn ``layer`` into one that is not there: it gets no place in ``contexts``, so none in the cache."""
    if corrected:
        expect(layer, **OBJECTS["layer"])
        expect(layer.input_layernorm, **OBJECTS["norm"])
    del contexts[layer.self_attn.attn.layer_name]
    layer.__class__ = mixed(CorrectedRemovedLayer if corrected else RemovedLayer, layer.__class__)


@cache
def mixed(mixin: Any, layer_class: Any) -> type:
    """The class of both; one for all layers, so that compilers see one class."""
    return type(mixin.__name__.replace("Layer", layer_class.__name__), (mixin, layer_class), {})
