"""What cannot be served is refused when vLLM reads its configuration, each with the reason and the remedy."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from orthorank.common.errors import OrthoRankError
from orthorank.packed import plans
from orthorank.plan_checks import misfits
from orthorank.serving.vllm import counts, hooks
from orthorank.serving.vllm.hooks import ARCHITECTURES
from orthorank.serving.vllm.serving import HOW, Serving
from orthorank.serving.vllm_interface import interface

SCHEDULER = "orthorank.serving.vllm.scheduler.make_scheduler"


def verify(vllm_config: Any) -> None:
    """Refuses what cannot be served, and sets what is: called once, by each front end, before vLLM starts.

    Raises:
        OrthoRankError: see `check`.
    """
    interface.require(interface.FRONT)
    serving = Serving.of(getattr(vllm_config.model_config.hf_config, "orthorank", None))
    check(serving, vllm_config)
    # A path becomes what it leads to now: all workers serve one plan, and compiled graphs are kept by it.
    vllm_config.model_config.hf_config.orthorank = serving.to_dict()
    scheduler = vllm_config.scheduler_config
    if needs_scheduler(serving, bool(vllm_config.cache_config.enable_prefix_caching)):
        if scheduler.scheduler_cls not in (None, SCHEDULER):
            raise OrthoRankError(
                f"scheduler_cls is {scheduler.scheduler_cls!r}, and this plan needs {SCHEDULER}; leave it out"
            )
        scheduler.scheduler_cls = SCHEDULER
    hooks.split_graphs(vllm_config.compilation_config)
    hooks.watch_prompts()
    counts.show()


def needs_scheduler(serving: Serving, prefix_caching: bool) -> bool:
    """Whether chunks have to end at windows, or blocks have to stay out of the prefix cache."""
    if serving.plan.select == "topk":
        return False
    return serving.plan.select == "window" or (prefix_caching and serving.reuse == "prompt")


def check(serving: Serving, vllm_config: Any) -> None:
    """Everything that is known before the weights are loaded.

    Raises:
        OrthoRankError: the plan cannot be served, or not with these settings of vLLM.
    """
    obstacles = chain(
        plan_obstacles(serving),
        model_obstacles(serving, vllm_config.model_config.hf_config),
        _architecture(vllm_config.model_config),
        _settings(vllm_config),
        _mode_obstacles(serving, vllm_config),
    )
    for obstacle in obstacles:
        raise OrthoRankError(obstacle)


def plan_obstacles(serving: Serving) -> Iterator[str]:
    """What a plan asks for and no server has."""
    plan = serving.plan
    if not plan.selecting and not plan.layers:
        yield "the plan has no layers; serve the model without it"
    yield from plans.obstacles(plan)
    if plan.selecting and plan.selecting[0] == 0:
        yield "layer 0 selects, and no sink has formed there; take it out of the plan"
    before = [layer for layer in plan.selecting if plan.sink_layer is not None and layer <= plan.sink_layer]
    if before:
        yield (
            f"layer {before[0]} selects, and the sink forms in layer {plan.sink_layer}; take it out of the plan, or "
            "correct the plan's sink_layer"
        )


def model_obstacles(serving: Serving, config: Any) -> Iterator[str]:
    """What does not fit the model of that ``config``, transformers' configuration."""
    plan = serving.plan
    if config.model_type not in ARCHITECTURES:
        yield f"the model's type is {config.model_type!r}; OrthoRank serves {', '.join(ARCHITECTURES)}"
    yield from misfits(plan, config)
    if getattr(config, "ada_rms_norm_t_cond", False):
        yield "the model's norms depend on a second input (ada_rms_norm_t_cond), which selecting layers do not know"
    if not getattr(config, "is_causal", True):
        yield "the model attends in both directions; token selection is for causal attention"


def _architecture(model_config: Any) -> Iterator[str]:
    """A class that is not the model's."""
    found, model_type = model_config.architecture, model_config.hf_config.model_type
    if (wanted := ARCHITECTURES.get(model_type)) is not None and found != wanted:
        yield (
            f"architectures is {found!r}, and the checkpoint's model_type is {model_type!r}, which is served by "
            f"{wanted!r}; pass that one, as `orthorank vllm-args PLAN --model FOLDER` prints it"
        )


def lost_plan(model_config: Any) -> Iterator[str]:
    """A plan beside an architecture that would not read it."""
    found = model_config.architecture
    if found in ARCHITECTURES.values():
        return
    model_type = getattr(model_config.hf_config, "model_type", "unknown")
    wanted = ARCHITECTURES.get(model_type)
    served = ", ".join(ARCHITECTURES)
    yield (
        f"the model's configuration has a plan (orthorank), and its architecture is {found!r}, which would be served "
        "dense, as if there were none: "
        + (
            f"set architectures to [{wanted!r}]: {HOW}"
            if wanted
            else f"model_type is {model_type!r}, and OrthoRank serves {served}; take the plan out"
        )
    )


def _settings(vllm_config: Any) -> Iterator[str]:
    """Settings of vLLM that selecting layers do not work with, or that were never tried."""
    parallel = vllm_config.parallel_config
    for name, flag in (
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        if getattr(parallel, name, 1) > 1:
            yield f"{flag} is above 1: a rank would see only some keys of a selected query; leave it out"
    if parallel.pipeline_parallel_size > 1:
        yield (
            "--pipeline-parallel-size is above 1, which is not tested with OrthoRank; use --tensor-parallel-size, over "
            "several nodes if need be"
        )
    if hooks.switched_on("VLLM_USE_BREAKABLE_CUDAGRAPH"):  # captured across the operators where vLLM splits others
        yield "VLLM_USE_BREAKABLE_CUDAGRAPH is set, which is not tested with OrthoRank; unset it"
    if hooks.switched_on("VLLM_USE_RUST_FRONTEND"):
        yield (
            "VLLM_USE_RUST_FRONTEND is set, and vLLM's front end in Rust has no plugins: nobody would check what "
            "requests say of their prompts (orthorank_dense), nor keep blocks of dense ones apart; unset it"
        )
    if getattr(parallel, "enable_dbo", False):
        yield "--enable-dbo splits a step in two, which selecting layers do not know; leave it out"
    if vllm_config.lora_config is not None:
        yield "--enable-lora: the sink's state depends on the adapter; merge the adapter into the model"
    if vllm_config.model_config.enable_prompt_embeds:
        yield "--enable-prompt-embeds: the sink's state is known by token, and an embedding has none; leave it out"
    if vllm_config.speculative_config is not None:
        yield "--speculative-config is set, which is not tested with OrthoRank; leave it out"
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        yield (
            "--kv-transfer-config is set, and vLLM hands keys and values to a connector in its own attention operator, "
            "which selecting layers do not call: another server would get none of theirs; leave it out"
        )


def _mode_obstacles(serving: Serving, vllm_config: Any) -> Iterator[str]:
    """What the plan's way to select asks of the scheduler and of the cache."""
    plan, scheduler = serving.plan, vllm_config.scheduler_config
    caching = bool(vllm_config.cache_config.enable_prefix_caching)
    if plan.select == "topk" and plan.selecting:
        if scheduler.enable_chunked_prefill:
            yield (
                "select is 'topk', which ranks a whole prompt at once, and prompts are computed in chunks: pass "
                "--no-enable-chunked-prefill, or use a plan with select 'window' or 'threshold'"
            )
        if caching:
            yield (
                "select is 'topk', and blocks of the prefix cache hold what another prompt selected: pass "
                "--no-enable-prefix-caching, or use a plan with select 'window' or 'threshold'"
            )
    if caching and serving.reuse == "prompt" and plan.select != "topk" and plan.keep_last > 1:
        yield (
            f"keep_last is {plan.keep_last}: a shorter prompt would find some of its forced tokens in the prefix "
            "cache, unforced; set the plan's keep_last to 1, pass --no-enable-prefix-caching, or accept it: reuse 'all'"
        )
    window = plan.select_window
    if window is None:
        return
    least = window + scheduler.max_num_seqs - 1  # a window beside every other request's generated token
    if scheduler.max_num_batched_tokens < least:
        yield (
            f"--max-num-batched-tokens is {scheduler.max_num_batched_tokens}, and a step needs {least}: a window of "
            f"{window} beside one token of each other request (--max-num-seqs); raise it, or prompts wait for answers"
        )
    if 0 < scheduler.long_prefill_token_threshold < window:
        yield (
            f"--long-prefill-token-threshold is {scheduler.long_prefill_token_threshold}, less than select_window, "
            f"{window}: no window would fit a chunk; raise it"
        )
