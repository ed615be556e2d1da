"""What differs between model families: one small spec each, no copied forward.

A spec says where the parts of a decoder layer are and what is done with them (`orthorank.families.parts`). The selected
layer's forward (`orthorank.hf.layer`) is one for all.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthorank.common.errors import OrthoRankError, type_of
from orthorank.common.patching import not_compiled
from orthorank.families import Family, always, plain_heads, split_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _window_of_config(attention: Any) -> int | None:
    """Mistral: one window for all layers."""
    return getattr(attention.config, "sliding_window", None)


def _window_of_layer(attention: Any) -> int | None:
    """Qwen2: the attention module knows whether its layer slides."""
    return getattr(attention, "sliding_window", None)


def _norm_of_heads(attention: Any, which: str, projected: Tensor) -> Tensor:
    """Qwen3, Gemma 3: each head of queries and keys is normed."""
    batch, tokens, _ = projected.shape
    heads = projected.view(batch, tokens, -1, attention.head_dim)
    return getattr(attention, f"{which}_norm")(heads).transpose(1, 2)


def _norm_before_heads(attention: Any, which: str, projected: Tensor) -> Tensor:
    """OLMo-2: queries and keys are normed over their whole width."""
    return split_heads(attention, getattr(attention, f"{which}_norm")(projected))


def _norm_of_cohere(attention: Any, which: str, projected: Tensor) -> Tensor:
    """Cohere: optional, with weights of their own for each head."""
    return (_norm_of_heads if attention.use_qk_norm else plain_heads)(attention, which, projected)


def _norm_of_stablelm(attention: Any, which: str, projected: Tensor) -> Tensor:
    """StableLM: optional, a module for each head."""
    heads = split_heads(attention, projected)
    return getattr(attention, f"{which}_layernorm")(heads) if attention.qk_layernorm else heads


def _rotates_smollm3(attention: Any) -> bool:
    """SmolLM3: every fourth layer has no rotary embedding."""
    return bool(attention.use_rope)


def _slides(attention: Any) -> bool:
    """Cohere 2: layers that see everything have no rotary embedding."""
    return attention.sliding_window is not None


def _parallel_stablelm(layer: Any) -> bool:
    """StableLM: an option of the model."""
    return bool(layer.use_parallel_residual)


_GEMMA_2 = Family(
    "Gemma 2",
    weight_offset=1.0,
    attn_out_norm="post_attention_layernorm",
    pre_mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
    window=_window_of_layer,
    softcap="attn_logit_softcapping",
)
_OLMO_2 = Family(
    "OLMo-2",
    input_norm=None,
    attn_out_norm="post_attention_layernorm",
    pre_mlp_norm=None,
    mlp_out_norm="post_feedforward_layernorm",
    heads=_norm_before_heads,
)
_COHERE = Family(
    "Cohere",
    norm="layer",
    pre_mlp_norm=None,
    parallel=always,
    heads=_norm_of_cohere,
    interleaved=True,
    angles="pairs",
)
_DROPS = "self_attn.residual_dropout"  # the MLPs of these families drop what they give themselves

_SPECS: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window=_window_of_config),
    "mixtral": Family("Mixtral", window=_window_of_config),
    "qwen2": Family("Qwen2", window=_window_of_layer),
    "qwen2_moe": Family("Qwen2-MoE", window=_window_of_layer),
    "qwen3": Family("Qwen3", heads=_norm_of_heads, window=_window_of_layer),
    "qwen3_moe": Family("Qwen3-MoE", heads=_norm_of_heads, window=_window_of_layer),
    "gemma": Family("Gemma", weight_offset=1.0),
    "gemma2": _GEMMA_2,
    # Its attention has the attribute of the soft-cap and does not use it.
    "gemma3_text": replace(_GEMMA_2, name="Gemma 3", heads=_norm_of_heads, softcap=None),
    "phi3": Family(
        "Phi-3",
        qkv="qkv_proj",
        window=_window_of_config,
        attn_out_dropout="resid_attn_dropout",
        mlp_out_dropout="resid_mlp_dropout",
    ),
    "olmo2": _OLMO_2,
    "olmo3": replace(_OLMO_2, name="OLMo-3", window=_window_of_layer),
    "granite": Family("Granite", residual_scale="residual_multiplier"),
    "smollm3": Family("SmolLM3", rotates=_rotates_smollm3, window=_window_of_layer),
    "stablelm": Family(
        "StableLM",
        norm="layer",
        torch_norm=True,
        parallel=_parallel_stablelm,
        heads=_norm_of_stablelm,
        mlp_out_dropout="dropout",
    ),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, name="Cohere 2", heads=plain_heads, rotates=_slides, window=_window_of_layer),
    "seed_oss": Family("Seed-OSS", attn_out_dropout=_DROPS),
    "arcee": Family("Arcee", gated=False),
    "starcoder2": Family(
        "StarCoder2", norm="layer", torch_norm=True, gated=False, window=_window_of_config, attn_out_dropout=_DROPS
    ),
    "nemotron": Family("Nemotron", norm="layer", weight_offset=1.0, gated=False),
    "helium": Family("Helium", interleaved=True),
    "glm": Family("GLM", interleaved=True),
    "ernie4_5": Family("ERNIE 4.5", interleaved=True),
    "gpt_oss": Family("GPT-OSS", angles="once", window=_window_of_layer, sinks="sinks"),
}
_PACKAGES = {"gemma3_text": "gemma3"}  # of transformers.models, where it is not called like the model type


# By model type: the package's own, and behind them what `register_family` adds.
FAMILIES: dict[str, Family] = {
    model_type: replace(spec, home=f"transformers.models.{package}.modeling_{package}")
    for model_type, spec in _SPECS.items()
    for package in [_PACKAGES.get(model_type, model_type)]
}
TESTED = frozenset(FAMILIES)  # whose tiny models the package's tests run


def register_family(model_type: str, family: Family) -> None:
    """Make models of a type that the package does not know known, in this process.

    The spec is believed of no model: `orthorank.check_family` compares it with the dense layers of a tiny copy before
    a plan is applied or a search begins. Registering a type again replaces its spec.

    Args:
        model_type: as the model's config names it. family: where its layers keep their parts.

    Raises:
        OrthoRankError: one of the two is something else, or the package has a tested spec of that type.

    Example:
        >>> register_family("my_decoder", Family("Mine", input_norm="ln_1", pre_mlp_norm="ln_2"))
        >>> FAMILIES.pop("my_decoder").name
        'Mine'
    """
    if not isinstance(model_type, str) or not model_type:
        raise OrthoRankError(f"model_type is {model_type!r}; it must be the model_type of a model's config, a string")
    if not isinstance(family, Family):
        raise OrthoRankError(f"family is {type_of(family)}; it must be an orthorank.Family")
    if model_type in TESTED:
        raise OrthoRankError(
            f"model_type is {model_type!r}, of which the package has a spec, {FAMILIES[model_type].name}, that its "
            "tests hold; give a model of other layers another model_type in its config"
        )
    FAMILIES[model_type] = family


def known_families() -> str:
    """What a message lists of them."""
    return ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())


def family_of(model: "PreTrainedModel") -> Family:
    """The spec of ``model``'s architecture.

    Raises:
        OrthoRankError: the architecture has no spec; the message lists the known ones.
    """
    config: Any = getattr(model, "config", None)
    model_type = config.get_text_config().model_type if hasattr(config, "get_text_config") else None
    if model_type not in FAMILIES:
        raise OrthoRankError(
            f"model is {type_of(model)} of type {model_type!r}, which has no spec: where its layers keep "
            f"norms, projections and MLP is not known. Known are: {known_families()}. To add one: "
            "orthorank.register_family(model_type, orthorank.Family(...))"
        )
    return FAMILIES[model_type]


def unwrapped(model: Any) -> Any:
    """``model`` without what PEFT or `torch.compile` put around it; both call the same layers."""
    while True:
        if callable(base := getattr(model, "get_base_model", None)):  # a PeftModel
            model = base()
        elif (original := not_compiled(model)) is not model:
            model = original
        else:
            return model


def layers_of(model: Any) -> list[Any]:
    """The decoder layers of ``model``, without what `torch.compile` puts around each."""
    return [not_compiled(layer) for layer in decoder_of(model).layers]


def decoder_of(model: "PreTrainedModel") -> Any:
    """The module that holds the decoder layers: ``model.model`` of a causal LM, or ``model`` itself."""
    model = unwrapped(model)
    decoder = getattr(model, "model", model)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise OrthoRankError(
            f"model is {type_of(model)} without decoder layers in .model.layers; pass the ...ForCausalLM model "
            "(of a model that reads images, too: its text part, loaded as one)"
        )
    return decoder


def device_of(module: nn.Module) -> torch.device:
    """The device that the input of ``module`` (a model, a layer) belongs on.

    That of its first parameter, or where `accelerate` runs it: offloaded parameters are on the meta device before.
    """
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
