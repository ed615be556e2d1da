"""Tiny random models: one for each family and each option of a family that changes its layers, and plain ones."""

import copy
from typing import Any, NamedTuple

import torch


class Tiny(NamedTuple):
    """A configuration: the model type, and what differs from `BASE`. Windows are smaller than the tests' prompts."""

    model_type: str
    settings: dict[str, Any]


BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # the default of 0.02 makes layers that hardly change their input
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
TWO_WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _partial(factor: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}}


MODELS: dict[str, Tiny] = {
    "llama-2": Tiny("llama", {"num_key_value_heads": 4}),
    "llama-3": Tiny("llama", {"rope_parameters": LLAMA_3, "attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny("mistral", {"sliding_window": 7, "head_dim": 24}),
    "mixtral": Tiny("mixtral", {"sliding_window": 7, "num_local_experts": 4}),
    "qwen2": Tiny("qwen2", TWO_WINDOWS),
    "qwen2-moe": Tiny("qwen2_moe", EXPERTS | TWO_WINDOWS | {"shared_expert_intermediate_size": 40}),
    "qwen2-moe-step": Tiny(
        "qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    ),
    "qwen3": Tiny("qwen3", TWO_WINDOWS),
    "qwen3-moe": Tiny("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3-moe-window": Tiny("qwen3_moe", EXPERTS | {"use_sliding_window": True, "sliding_window": 7}),
    "gemma": Tiny("gemma", {}),
    "gemma-2": Tiny(
        "gemma2",
        {
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma-3": Tiny(
        "gemma3_text",
        {
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        }
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi-3": Tiny("phi3", _partial(0.5) | {"sliding_window": 7}),
    "phi-3-mha": Tiny("phi3", {"num_key_value_heads": 4}),
    "olmo-2": Tiny("olmo2", {}),
    "olmo-3": Tiny("olmo3", {"sliding_window": 7, "layer_types": ALTERNATING}),
    "granite": Tiny(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "smollm3": Tiny("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "smollm3-window": Tiny(
        "smollm3", {"no_rope_layers": [1, 0, 1, 1], "use_sliding_window": True, "sliding_window": 7}
    ),
    "stablelm": Tiny("stablelm", _partial(0.25) | {"use_qkv_bias": True}),
    "stablelm-parallel": Tiny("stablelm", _partial(0.5) | {"use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": Tiny("cohere", {"logit_scale": 0.25}),
    "cohere-norms": Tiny("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere-2": Tiny("cohere2", {"logit_scale": 0.25, "sliding_window": 7, "layer_types": ALTERNATING}),
    "seed-oss": Tiny("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "arcee": Tiny("arcee", {"attention_bias": True, "mlp_bias": True}),
    "starcoder-2": Tiny("starcoder2", {"sliding_window": 7}),
    "nemotron": Tiny("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "helium": Tiny("helium", {"attention_bias": True}),
    "glm": Tiny("glm", _partial(0.5)),
    "ernie-4.5": Tiny("ernie4_5", {"use_bias": True}),
    "gpt-oss": Tiny(
        "gpt_oss", {"sliding_window": 7, "layer_types": ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
}


def tiny(name: str, seed: int = 0, attention: str | None = None, **overrides: Any) -> Any:
    """The model called ``name``, fp32, in eval mode, with norms and biases away from ones and zeros."""
    model_type, settings = MODELS[name]
    with torch.random.fork_rng():
        model = _made(model_type, seed, attention, settings | overrides)
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in key or key.endswith("_bias"):
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def plain(model_type: str, seed: int = 0, attention: str | None = None, **overrides: Any) -> Any:
    """A model as transformers makes it, fp32, in eval mode: its norms are ones, its biases zeros."""
    with torch.random.fork_rng():
        return _made(model_type, seed, attention, {"intermediate_size": 128} | overrides)


def _made(model_type: str, seed: int, attention: str | None, settings: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**(BASE | settings))
    kwargs = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, **kwargs).float().eval()


def has_windows(model: Any) -> bool:
    """Whether any layer of ``model`` slides."""
    kinds = getattr(model.config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(model.config, "sliding_window", None) is not None


def without_layers(model: Any, layers: list[int]) -> Any:
    """A deep copy of ``model`` in which ``layers`` do not exist."""
    pruned = copy.deepcopy(model)
    kept = [layer for i, layer in enumerate(pruned.model.layers) if i not in layers]
    pruned.model.layers = torch.nn.ModuleList(kept)
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    if getattr(pruned.config, "layer_types", None) is not None:
        pruned.config.layer_types = [t for i, t in enumerate(pruned.config.layer_types) if i not in layers]
    pruned.config.num_hidden_layers = len(kept)
    return pruned
