"""Where this package reaches into vLLM: what it registers, what it asks of a running step, what it has told to it.

What each of these needs of vLLM, and whether the installed one has it, is said in `interface`.
"""

import copy
import functools
import inspect
from functools import cache
from typing import Any

from orthorank.common.errors import OrthoRankError
from orthorank.serving.vllm.rules import (
    DENSE,
    PROMPT_TOKENS,
    check_request,
    dense_salt,
    extra_of,
    params_of,
    prompt_tokens,
    without_layers,
)
from orthorank.serving.vllm_interface.checks import served_dense

OPERATOR = "orthorank::decoder_layer"
MODELS = "orthorank.serving.vllm.models"
# What a checkpoint's model_type is served by.
ARCHITECTURES = {
    "llama": "OrthoRankLlamaForCausalLM",
    "mistral": "OrthoRankMistralForCausalLM",
    "qwen2": "OrthoRankQwen2ForCausalLM",
    "qwen3": "OrthoRankQwen3ForCausalLM",
}
# Methods of a worker after which the weights may be others.
CHANGE_WEIGHTS = (
    "reload_weights",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "reset_weights",
    "wake_up",
)


def split_graphs(compilation: Any) -> None:
    """Have graphs of this engine's configuration split at the operator.

    Args:
        compilation: vLLM's ``compilation_config``. The list of its class would be that of all engines.
    """
    chosen = compilation.splitting_ops
    if chosen is None:  # vLLM's choice, which is a copy of this
        compilation._attention_ops = list(dict.fromkeys([*compilation._attention_ops, OPERATOR]))
    elif chosen and OPERATOR not in chosen:
        compilation.splitting_ops = [*chosen, OPERATOR]


def context() -> Any:
    """What vLLM knows of the forward pass that is running."""
    from vllm.forward_context import get_forward_context

    return get_forward_context()


def layer_named(name: str) -> Any:
    """The layer that put itself into the forward context under ``name``."""
    return context().no_compile_layers[name]


def metadata_of(layer_name: str) -> Any:
    """The attention metadata of that attention layer in this step; None while vLLM warms up.

    Raises:
        OrthoRankError: there are metadata, and none of that layer.
    """
    found = context().attn_metadata
    if found is None:
        return None
    if not isinstance(found, dict) or layer_name not in found:
        raise served_dense(
            f"vLLM's forward context has attn_metadata of type {type(found).__name__} without {layer_name}"
        )
    return found[layer_name]


def slots_of(attention: Any) -> Any:
    """Where the cache of that attention layer keeps each token of this step; -1: nowhere. There may be more tokens."""
    return context().slot_mapping[attention.layer_name]


def write_cache(attention: Any, keys: Any, values: Any) -> None:
    """The backend's own update of its cache with the keys and values of all tokens."""
    attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots_of(attention))


def switched_on(name: str) -> bool:
    """Whether vLLM reads the environment variable ``name`` as true; not where it knows of none."""
    from vllm import envs

    return bool(getattr(envs, name, False))


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

    @functools.wraps(original)
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


@cache
def watch_weights() -> None:
    """Have every worker forget the sinks' states when its weights change, and be told so; and be told to `switch`."""
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase

    for name in CHANGE_WEIGHTS:
        if (method := getattr(Worker, name, None)) is not None:  # vLLM 0.31 has no `reset_weights`
            setattr(Worker, name, _then_forgets(method))
    WorkerBase.orthorank_weights_changed = weights_changed
    WorkerBase.orthorank_switch = switch


def _then_forgets(original: Any) -> Any:
    @functools.wraps(original)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _of_its_layers(self, original, args, kwargs)
        try:
            result = original(self, *args, **kwargs)
        except BaseException as error:  # some weights may be others already
            try:
                weights_changed(self)
            except Exception as second:  # the first error is the one to mend
                error.add_note(f"orthorank: the sinks' states could not be forgotten: {second!r}")
            raise
        weights_changed(self)
        return result

    return change


def _of_its_layers(worker: Any, original: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``original``, by place or by name, without weights of layers that the plan removes."""
    if getattr(worker, "model_runner", None) is None:
        return args, kwargs
    shared = getattr(worker.get_model(), "orthorank", None)
    if shared is None or not shared.removed:
        return args, kwargs
    names = list(inspect.signature(original).parameters)[1:]
    if names == ["args", "kwargs"]:  # handed on to the model runner as they are
        names = list(inspect.signature(getattr(worker.model_runner, original.__name__)).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    weights = given.get("weights_iterator")
    if weights is None:
        return args, kwargs
    kept = without_layers(weights, shared.removed, shared.normed)
    if "weights_iterator" in kwargs:
        return args, kwargs | {"weights_iterator": kept}
    place = names.index("weights_iterator")
    return (*args[:place], kept, *args[place + 1 :]), kwargs


def weights_changed(worker: Any) -> bool:
    """What ``collective_rpc("orthorank_weights_changed")`` calls in every worker: the sinks' states are forgotten.

    Returns:
        Whether the worker's model has a plan.
    """
    if getattr(worker, "model_runner", None) is None:
        return False
    shared = getattr(worker.get_model(), "orthorank", None)
    if shared is not None:
        shared.bank.forget()
    return shared is not None


def switch(worker: Any, on: bool) -> dict[str, Any]:
    """What ``collective_rpc("orthorank_switch", args=(False,))`` calls in every worker: all prompts are dense, or not.

    What is cached stays as it was computed: reset vLLM's prefix cache afterwards, with the requests that are running.

    Returns:
        ``on``: whether prompts are selected from now; ``said``: why not, where they should be, or why they are still.
    """
    shared = None
    if getattr(worker, "model_runner", None) is not None:
        shared = getattr(worker.get_model(), "orthorank", None)
    if shared is None:
        return {"on": False, "said": "the model of this worker has no plan"}
    said = ""
    if type(on) is not bool:
        said = f"on is {on!r}; it must be true or false: nothing was changed"
    elif not on and shared.removed:
        layers = ", ".join(map(str, shared.removed))
        said = (
            f"the plan removes layers ({layers}), whose weights are not here, so no prompt can be dense: nothing was "
            "changed; start a server without the plan"
        )
    else:
        shared.on = on
    return {"on": shared.on, "said": said}


@cache
def watch_prompts() -> None:
    """Have requests say what workers and schedulers have to know of them.

    That is how many of their tokens are the prompt's own (beams come back with what they generated), and whether the
    prompt is dense: it was asked for, or the prompt is shorter than the plan's ``min_prompt``.
    """
    from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    get_prompt, process = BeamSearchSequence.get_prompt, InputProcessor.process_inputs

    @functools.wraps(get_prompt)
    def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompt = get_prompt(self, *args, **kwargs)
        if prompt["type"] == "token":
            prompt[PROMPT_TOKENS] = len(self.orig_prompt["prompt_token_ids"])
        return prompt

    @functools.wraps(process)
    def processed(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        plan = getattr(self.model_config.hf_config, "orthorank", None)
        if plan is None:  # another engine of this process
            return process(self, request_id, prompt, params, *args, **kwargs)
        said = prompt if isinstance(prompt, dict) else {}
        try:
            check_request(extra_of(params), said.get("cache_salt"))
        except OrthoRankError as error:
            raise VLLMValidationError(str(error)) from error  # the client's fault, as servers answer it
        request = process(self, request_id, prompt, params, *args, **kwargs)
        if PROMPT_TOKENS in said:
            _mark(request, {PROMPT_TOKENS: said[PROMPT_TOKENS]})
        tokens, least = len(request.prompt_token_ids or ()), int(plan["plan"].get("min_prompt", 0))
        if prompt_tokens(tokens, params_of(request), least) < 0:
            _mark(request, {DENSE: True})
            request.cache_salt = dense_salt(request.cache_salt)
        return request

    BeamSearchSequence.get_prompt = marked
    InputProcessor.process_inputs = processed


def _mark(request: Any, marks: dict[str, Any]) -> None:
    """Add ``marks`` to what the request says. Its parameters may be shared: all beams of a step have the same."""
    for params, extra in (("sampling_params", "extra_args"), ("pooling_params", "extra_kwargs")):
        if getattr(request, params) is not None:
            told = copy.copy(getattr(request, params))
            setattr(told, extra, (getattr(told, extra) or {}) | marks)
            setattr(request, params, told)
