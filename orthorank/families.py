"""What differs between model families: one small spec each, no copied forward.

A spec says where the parts of a decoder layer are. The selected layer's forward (`orthorank.layer`) is one for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthorank.errors import OrthoRankError
from orthorank_kernels import silu_and_mul

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _no_window(attention: Any) -> int | None:
    """Llama: every query sees everything before it."""
    return None


def _window_of_config(attention: Any) -> int | None:
    """Mistral: one window for all layers."""
    return getattr(attention.config, "sliding_window", None)


def _window_of_layer(attention: Any) -> int | None:
    """Qwen2: the attention module knows whether its layer slides."""
    return getattr(attention, "sliding_window", None)


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps the parts of a decoder layer.

    Args:
        name: the architecture's name as users know it.
        norm_in, attention, norm_post, mlp: attribute names in the decoder layer.
        window: from the attention module to its sliding window in tokens, or None when it sees everything.
    """

    name: str
    norm_in: str = "input_layernorm"
    attention: str = "self_attn"
    norm_post: str = "post_attention_layernorm"
    mlp: str = "mlp"
    window: Callable[[Any], int | None] = _no_window

    def parts(self, layer: nn.Module) -> "Parts":
        """The modules of ``layer``; raises when the layer does not look as this spec says."""
        names = (self.norm_in, self.attention, self.norm_post, self.mlp)
        if missing := [name for name in names if not isinstance(getattr(layer, name, None), nn.Module)]:
            raise OrthoRankError(
                f"a {type(layer).__name__} has no {', '.join(missing)}, which {self.name} layers have; the installed "
                "transformers may be newer than this package: see the supported range in the README"
            )
        norm_in, attention, norm_post, mlp = (getattr(layer, name) for name in names)
        parts = Parts(norm_in, attention, norm_post, mlp, self.window)
        parts.check(self.name)
        return parts


@dataclass(frozen=True)
class Parts:
    """The modules of one decoder layer, and the few things that are read from them."""

    norm_in: nn.Module
    attention: nn.Module
    norm_post: nn.Module
    mlp: nn.Module
    window_of: Callable[[Any], int | None]

    def check(self, family: str) -> None:
        """The norms and the attention have the parameters that the kernels read."""
        for module, names in ((self.norm_in, NORM), (self.norm_post, NORM), (self.attention, ATTENTION)):
            if missing := [name for name in names if not hasattr(module, name)]:
                raise OrthoRankError(
                    f"a {type(module).__name__} has no {', '.join(missing)}, which {family} models have; the installed "
                    "transformers may be newer than this package: see the supported range in the README"
                )

    @property
    def window(self) -> int | None:
        """Keys that a query sees, itself included; None for all."""
        return self.window_of(self.attention)

    def heads(self, projected: Tensor) -> Tensor:
        """``[batch, tokens, heads * head_dim]`` to a ``[batch, heads, tokens, head_dim]`` view."""
        batch, tokens, _ = projected.shape
        attention: Any = self.attention
        return projected.view(batch, tokens, -1, attention.head_dim).transpose(1, 2)

    def keys_and_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (not yet rotated) and values of ``normed`` ``[batch, tokens, hidden]``."""
        attention: Any = self.attention
        return self.heads(attention.k_proj(normed)), self.heads(attention.v_proj(normed))

    def queries(self, normed: Tensor) -> Tensor:
        """Queries (not yet rotated) of ``normed`` ``[batch, tokens, hidden]``."""
        attention: Any = self.attention
        return self.heads(attention.q_proj(normed))

    def output(self, attended: Tensor) -> Tensor:
        """The output projection of ``attended`` ``[batch, heads, tokens, head_dim]``."""
        batch, _, tokens, _ = attended.shape
        attention: Any = self.attention
        return attention.o_proj(attended.transpose(1, 2).reshape(batch, tokens, -1))

    def feed_forward(self, normed: Tensor) -> Tensor:
        """The MLP of ``normed`` ``[batch, tokens, hidden]``, with activation and product in one pass if it is SwiGLU.

        The projections are called as modules, so that quantised and adapted ones, and their hooks, are what they are.
        """
        mlp: Any = self.mlp
        if not _is_swiglu(mlp):
            return mlp(normed)
        return mlp.down_proj(silu_and_mul(mlp.gate_proj(normed), mlp.up_proj(normed)))


# Whose forward is down_proj(silu(gate_proj(x)) * up_proj(x)), if nobody changed it.
SWIGLU = ("LlamaMLP", "MistralMLP", "Qwen2MLP")


def _is_swiglu(mlp: Any) -> bool:
    kind, activation = type(mlp), getattr(mlp, "act_fn", None)
    return (
        kind.__name__ in SWIGLU
        and all(m.startswith("transformers.models.") for m in (kind.__module__, kind.forward.__module__))
        and type(activation).__name__ in ("SiLU", "SiLUActivation")
        and not _is_changed(mlp)
        and not _is_changed(activation)
    )


def _is_changed(module: Any) -> bool:
    """Whether calling ``module`` runs more, or something else, than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(hooks)


NORM = ("weight", "variance_epsilon")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window=_window_of_config),
    "qwen2": Family("Qwen2", window=_window_of_layer),
}


def family_of(model: "PreTrainedModel") -> Family:
    """The spec of ``model``'s architecture.

    Raises:
        OrthoRankError: the architecture has no spec; the message lists the known ones.
    """
    config: Any = getattr(model, "config", None)
    model_type = config.get_text_config().model_type if hasattr(config, "get_text_config") else None
    if model_type not in FAMILIES:
        known = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
        raise OrthoRankError(
            f"model is a {type(model).__name__} of type {model_type!r}, which has no spec; known are: {known}"
        )
    return FAMILIES[model_type]


def decoder_of(model: "PreTrainedModel") -> Any:
    """The module that holds the decoder layers: ``model.model`` of a causal LM, or ``model`` itself."""
    decoder = getattr(model, "model", model)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise OrthoRankError(
            f"model is a {type(model).__name__} without decoder layers in .model.layers; pass the ...ForCausalLM model"
        )
    return decoder


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is: the device that its input belongs on."""
    return next(model.parameters()).device
