"""A plan stated with a dense model's own layers, for whole batches and over caches.

The layer's own forward runs on all tokens, with keys and values of all of them, whatever its family: a selected token's
row of that is what the plan must give, and an unselected token keeps its input. Nothing of the package is used.
"""

import math
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class DenseRows:
    """Inside, ``layers`` of a dense ``model`` update the selected tokens alone.

    Args:
        layers: which; ratio: share of each row's tokens, per call; keep_last: tokens at each row's end updated anyway.
        criterion: ``"orthogonal"``, ``"inverse"``, ``"prenorm"`` or ``"cosine"``.
    """

    def __init__(
        self, model: Any, layers: list[int], ratio: float, keep_last: int = 0, criterion: str = "orthogonal"
    ) -> None:
        self.model, self.layers, self.ratio, self.keep_last, self.criterion = model, layers, ratio, keep_last, criterion
        self.past, self.dense = 0, False
        self.mask: Tensor = torch.empty(0)
        self.sinks: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}  # of each row

    def __enter__(self) -> "DenseRows":
        modules = self.model.model.layers
        self.hooks = [
            modules[layer].register_forward_hook(
                lambda module, args, output, layer=layer: self._select(module, layer, args[0], output)
            )
            for layer in self.layers
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def __call__(self, ids: Tensor, mask: Tensor, cache: Any = None, dense: bool = False) -> Tensor:
        """Logits of the next tokens ``ids`` ``[batch, tokens]``; mask: of all columns so far; dense: decoded tokens."""
        self.mask, self.dense = mask, dense
        self.past = mask.shape[1] - ids.shape[1]
        return call(self.model, ids, mask, cache)

    def _select(self, module: Any, layer: int, h: Tensor, output: Any) -> Tensor:
        output = output[0] if isinstance(output, tuple) else output
        if self.dense:
            return output
        normed = hasattr(module, "input_layernorm") and self.criterion != "prenorm"
        x = (module.input_layernorm(h) if normed else h).detach().double()
        chosen = torch.zeros(h.shape[:2], dtype=torch.bool)
        for row in range(len(h)):
            for token in self._chosen(layer, row, x[row]):
                chosen[row, token] = True
        return torch.where(chosen[..., None], output, h)

    def _chosen(self, layer: int, row: int, x: Tensor) -> list[int]:
        valid = self.mask[row, self.past :].nonzero().flatten().tolist()
        if not valid:
            return []
        first = row not in self.sinks[layer]
        if first:
            self.sinks[layer][row] = x[valid[0]]
        scores = (x @ self.sinks[layer][row]).abs()
        if self.criterion == "cosine":
            scores = scores / x.norm(dim=-1)
        if self.criterion == "inverse":
            scores = -scores
        forced = set(valid[len(valid) - self.keep_last :]) if self.keep_last else set()
        order = sorted(valid, key=lambda i: (first and i == valid[0], i not in forced, float(scores[i]), i))
        k = math.floor(self.ratio * len(valid) + 1e-6)
        if self.keep_last:
            k = min(len(valid) - first, max(k, self.keep_last))
        return order[:k]


def call(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
    """Logits of one call, with positions counted from each row's first token."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    kwargs: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache}
    return model(ids, attention_mask=mask, position_ids=positions, **kwargs).logits
