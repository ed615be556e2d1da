"""What a model with a plan applied does not do, and why: said when it is asked for, before anything runs."""

from typing import Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.patching import Patch

CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
OUTPUTS = {
    "output_attentions": "has no attention weights of all tokens to give",
    "output_router_logits": "sends the selected tokens alone through its router, so its logits are not of all tokens",
}


class Refused(Patch):
    """A method that would run the model on several sequences in one row (transformers' continuous batching)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise OrthoRankError(
            f"{self.name} packs the tokens of many requests into one row, each with a sink of its own, which a plan "
            "cannot rank; call generate() on a padded batch, serve the plan with vLLM, or call handle.remove() first"
        )


def refused_methods(model: Any) -> list[Patch]:
    """Patches of the methods of ``model`` that refuse."""
    return [Refused(model, name) for name in CONTINUOUS if hasattr(model, name)]


def refuse_outputs(decoder: Any, kwargs: dict[str, Any]) -> None:
    """Outputs that a layer which selects tokens does not have.

    Raises:
        OrthoRankError: one of them was asked for, in the call or in the model's configuration.
    """
    for name, reason in OUTPUTS.items():
        wanted = kwargs.get(name)
        if wanted if wanted is not None else getattr(decoder.config, name, False):
            raise OrthoRankError(
                f"{name} is True; a layer that selects tokens {reason}: pass {name}=False, or call handle.remove() "
                "first"
            )


def refuse_unrun(layers: list[int], ran: list[int], total: int) -> None:
    """Layers of the plan that a call of the model did not reach: the plan would be followed in part, in silence.

    Args:
        layers: the plan's; ran: those that ran; total: layers that the model says it runs.
    """
    missing = [layer for layer in layers if layer not in ran and layer < total]
    if missing:
        raise OrthoRankError(
            f"layer {', '.join(map(str, missing))} of the plan did not run in this call: the layer, or its forward, "
            "was replaced after the plan was applied; call handle.remove(), then apply the plan again"
        )
