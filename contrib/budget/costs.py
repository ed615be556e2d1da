"""What a layer costs at each keep ratio: FLOPs counted, or seconds measured.

Embedding, final norm and language-model head cost every plan the same and are left out: a cost is that of the decoder
layers, and a budget of 0.8 is 0.8 of what the layers cost when all are dense, as a sparsity of 20 % means it.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError
from orthorank_kernels import keep_count

if TYPE_CHECKING:
    from torch import Tensor

    from orthorank.stack.layers import LayerStack

UNITS = ("flops", "time")
OnRound = Callable[[int, int], None]


@dataclass(frozen=True)
class CostTable:
    """Costs of the decoder layers.

    Args:
        unit: ``"flops"`` or ``"time"`` (seconds). tokens: the prompt length that they hold for.
        by_ratio: for each keep ratio, 0 and 1 among them, the cost of each layer.

    Example:
        >>> table = CostTable("flops", 512, {1.0: (4.0, 4.0), 0.5: (3.0, 3.0), 0.0: (0.0, 0.0)})
        >>> table.dense, table.of({1: 0.5}), table.of({0: 0.0, 1: 0.5})
        (8.0, 7.0, 3.0)
    """

    unit: str
    tokens: int
    by_ratio: Mapping[float, tuple[float, ...]]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.by_ratio[1.0])

    @property
    def dense(self) -> float:
        """Of all layers dense."""
        return self.of({})

    def layer(self, layer: int, ratio: float) -> float:
        """Of one layer."""
        try:
            return self.by_ratio[ratio][layer]
        except (KeyError, IndexError):
            raise OrthoRankError(
                f"the cost of layer {layer} at keep ratio {ratio:.4g} is not in the table; make it with all keep "
                "ratios of the search and of the plans that it begins from"
            ) from None

    def of(self, plan: Mapping[int, float]) -> float:
        """Of a plan, layers that are not in it being dense.

        Added up from the first layer to the last, so that equal plans have equal costs to the last bit.
        """
        return sum(self.layer(layer, plan.get(layer, 1.0)) for layer in range(self.num_layers))

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it."""
        return {
            "unit": self.unit,
            "tokens": self.tokens,
            "by_ratio": [[ratio, list(costs)] for ratio, costs in self.by_ratio.items()],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CostTable":
        """What `to_dict` made."""
        by_ratio = {float(ratio): tuple(map(float, costs)) for ratio, costs in values["by_ratio"]}
        return cls(str(values["unit"]), int(values["tokens"]), by_ratio)


def count_flops(config: Any, tokens: int, ratios: Iterable[float], rank: int = 0) -> CostTable:
    """FLOPs of each layer for one prompt, by `orthorank.stack.flops`.

    Args:
        config: the Hugging Face configuration. tokens: prompt length. ratios: keep ratios; 0 and 1 are added.
        rank: of the maps of layers that are not dense; 0: they have none.

    Raises:
        OrthoRankError: a number out of range, or FLOPs are not counted for the model.

    Example:
        >>> from transformers import LlamaConfig
        >>> table = count_flops(LlamaConfig(num_key_value_heads=32), 2048, [1/3])
        >>> round(table.layer(0, 1/3) / table.layer(0, 1.0), 2)  # keys and values of all tokens are still paid
        0.44
    """
    from orthorank.stack.flops import Dimensions

    if tokens < 1:
        raise OrthoRankError(f"tokens is {tokens}; it must be at least 1")
    sizes = Dimensions.of(config)
    return CostTable(
        "flops",
        tokens,
        {
            ratio: tuple(
                (sizes.layer(index, tokens, keep_count(tokens, ratio)) if ratio > 0 else 0.0)
                + (sizes.map(tokens, rank) if ratio < 1 else 0.0)
                for index in range(sizes.layers)
            )
            for ratio in _with_ends(ratios)
        },
    )


def measure_seconds(
    stack: "LayerStack",
    input_ids: "Tensor",
    ratios: Iterable[float],
    *,
    rounds: int = 9,
    on_round: OnRound | None = None,
) -> CostTable:
    """Seconds of each layer for the prompt ``input_ids``, measured on this machine as it is now.

    One layer of each kind stands for all of its kind (layers of one shape with one attention window are alike). Kinds
    and ratios take turns, in an order that rotates from round to round, and a cost is the median over the rounds. A
    removed layer costs nothing.

    Args:
        stack: the model. input_ids: int64 ``[batch, tokens]``. ratios: keep ratios; 0 and 1 are added.
        rounds: timed runs of each kind at each ratio, after one untimed.
        on_round: called after each round as ``on_round(done, rounds)``.

    Raises:
        OrthoRankError: a number out of range.
    """
    from orthorank.evaluation.speed import clock_of, in_turns
    from orthorank.hf.families import device_of

    if rounds < 1:
        raise OrthoRankError(f"rounds is {rounds}; it must be at least 1")
    if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise OrthoRankError(
            f"input_ids has shape {list(input_ids.shape)}; it must be [batch, tokens], 2 tokens or more"
        )
    wanted, kinds = _with_ends(ratios), _kinds(stack)
    inputs = stack.embed(input_ids.to(device_of(stack.model)))
    timed = {f"{layer} {ratio!r}": (layer, ratio) for layer in dict.fromkeys(kinds) for ratio in wanted if ratio > 0}
    _, seconds = clock_of(device_of(stack.model))

    def run(name: str) -> float:
        layer, ratio = timed[name]

        def forward() -> None:
            stack.run(layer, inputs.hidden_states, inputs, ratio)

        return seconds(forward)

    taken = in_turns(list(timed), run, rounds=rounds, on_round=on_round)
    medians = {timed[name]: statistics.median(each) for name, each in taken.items()}
    by_ratio = {ratio: tuple(medians[kind, ratio] if ratio > 0 else 0.0 for kind in kinds) for ratio in wanted}
    return CostTable("time", input_ids.shape[1], by_ratio)


def _with_ends(ratios: Iterable[float]) -> list[float]:
    wanted = {float(ratio) for ratio in ratios} | {0.0, 1.0}
    if wrong := sorted(ratio for ratio in wanted if not 0 <= ratio <= 1):
        raise OrthoRankError(f"ratios holds {wrong[0]:g}; it must be from 0 (a removed layer) to 1 (a dense one)")
    return sorted(wanted, reverse=True)


def _kinds(stack: "LayerStack") -> list[int]:
    """For each layer the first one that is of its kind: the same shapes of weights, the same attention window."""
    first: dict[object, int] = {}
    kinds = []
    for index, parts in enumerate(stack.parts):
        layer = stack.decoder.layers[index]
        shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
        kinds.append(first.setdefault((type(layer), shapes, parts.window), index))
    return kinds
