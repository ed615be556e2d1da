"""Prefill throughput and time to first token inside vLLM: an engine for the dense model and one for each plan.

All engines are up before anything is timed, with the same settings, and take turns (see `orthorank.speed.timing`).
A time is the wall clock around `vllm.LLM.generate` for one token: scheduler, sampling and the way between processes
are in it, as a server's users have them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.serving.vllm.arguments import vllm_arguments
from orthorank.serving.vllm.installed import installed
from orthorank.serving.vllm.serving import Serving
from orthorank.speed.bench import BenchSettings, OnStep
from orthorank.speed.bench_results import fields_of
from orthorank.speed.timing import SpeedReport, Timing, clock_of, in_turns, timings_of
from orthorank.stack.flops import Dimensions
from orthorank_kernels.remedies import install

MEMORY = 0.9  # of a GPU, shared by the engines
PAGE = 128  # tokens; no default block of vLLM is larger
OURS = ("model", "hf_overrides", "worker_extension_cls")


@dataclass(frozen=True)
class VLLMReport:
    """What `run_vllm_bench` measured.

    Args:
        settings: what was asked for; arguments: of every engine, beside the plan.
        version: of vLLM; backend: its attention backend.
        prefill: ``batch_size`` prompts at once, one token each. The first variant is the baseline.
        first_token: one prompt alone, one token. By variant.
        attention: how selected queries attended, by variant: ``"paged"``, ``"portable"``; None where none did.
    """

    settings: BenchSettings
    arguments: dict[str, Any]
    version: str
    backend: str
    prefill: SpeedReport
    first_token: dict[str, Timing]
    attention: dict[str, str | None]

    @property
    def remark(self) -> str | None:
        """What must be said with the figures, if they are not those of a GPU."""
        if self.prefill.device != "cpu":
            return None
        ways = sorted({way for way in self.attention.values() if way})
        ran = f" Selected queries attended by the {' and the '.join(ways)} path." if ways else ""
        return f"This is a CPU figure: it says nothing about a GPU.{ran}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON stores it."""
        asked = ("prompt_tokens", "batch_size", "rounds", "warmup")
        return {
            "engine": "vllm",
            "version": self.version,
            "remark": self.remark,
            "settings": {name: getattr(self.settings, name) for name in asked},
            "engine_arguments": self.arguments,
            "attention_backend": self.backend,
            "attention": self.attention,
            "prefill": self.prefill.to_dict(),
            "first_token": {name: timing.to_dict() for name, timing in self.first_token.items()},
        }


def run_vllm_bench(
    path: str,
    config: Any,
    variants: Mapping[str, OrthoRankConfig | None],
    settings: BenchSettings,
    *,
    arguments: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> VLLMReport:
    """Measure each variant in an engine of its own, on prompts of random token ids from a fixed seed.

    Args:
        path: folder or hub id of the model; config: its Hugging Face configuration.
        variants: names and plans; None is the dense model. The first one is the baseline.
        settings: decoding and the break-even are not measured here.
        arguments: keyword arguments of `vllm.LLM` for all engines, beyond those of `engine_arguments`.
        on_step: called after each engine's start and each round as ``on_step(what, done, total)``.

    Raises:
        OrthoRankError: vLLM is not there or cannot start with the model, or a plan cannot be served.
    """
    check_installed()
    _log_to_stderr()
    common = engine_arguments(config, variants, settings) | _foreign(arguments)
    step = on_step or (lambda what, done, total: None)
    with ExitStack() as stack:
        engines: dict[str, Any] = {}
        stack.callback(_leave)
        for name, plan in variants.items():
            engines[name] = stack.enter_context(_engine(path, common | _plan_arguments(plan, config)))
            step("engines", len(engines), len(variants))
        return _measure(engines, config, settings, common, step)


def engine_arguments(
    config: Any, variants: Mapping[str, OrthoRankConfig | None], settings: BenchSettings
) -> dict[str, Any]:
    """What all engines are started with: every plan gets what it needs, and the dense model the same.

    Prompts meant to be processed together fit into one step, and the cache holds them twice. Prefix caching is off.

    Example:
        >>> from transformers import LlamaConfig
        >>> from orthorank import OrthoRankConfig
        >>> found = engine_arguments(LlamaConfig(), {"plan": OrthoRankConfig([2])}, BenchSettings(prompt_tokens=100))
        >>> found["enable_chunked_prefill"], found["enable_prefix_caching"], found["max_num_batched_tokens"]
        (False, False, 101)
    """
    length, sizes = settings.prompt_tokens + 1, Dimensions.of(config)
    blocks = -(-length // PAGE) + 1
    needed: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_model_len": length,
        "max_num_seqs": settings.batch_size,
        "max_num_batched_tokens": settings.batch_size * length,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": round(MEMORY / len(variants), 3),
        "kv_cache_memory_bytes": 2 * (settings.batch_size * blocks + 1) * PAGE * sizes.layers * 2 * sizes.key * 4,
    }
    for plan in variants.values():
        asked = _plan_arguments(plan, config)
        asked.pop("hf_overrides", None)
        window = getattr(plan, "select_window", None) or 0  # which has to fit beside a token of each other prompt
        most = max(needed["max_num_batched_tokens"], window + settings.batch_size - 1)
        needed |= asked | {"max_num_batched_tokens": most}
    return needed


def check_installed() -> None:
    """vLLM is there, with what the plugin needs of it."""
    if (here := installed()).version is None:
        raise OrthoRankError(f"engine is 'vllm', which is not installed; run: {install('vllm')}")
    if here.obstacle is not None:
        raise OrthoRankError(f"engine is 'vllm', and its plugin {here.obstacle}")


def _plan_arguments(plan: OrthoRankConfig | None, config: Any) -> dict[str, Any]:
    return {} if plan is None else vllm_arguments(Serving(plan), config, prefix_caching=False)


def _foreign(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    for name in arguments or {}:
        if name in OURS:
            raise OrthoRankError(f"the arguments of vLLM hold {name!r}, which is set for each variant; leave it out")
    return dict(arguments or {})


def _log_to_stderr() -> None:
    """vLLM writes its log to stdout, where results are printed, unless it is told otherwise before it is imported."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextmanager
def _engine(path: str, arguments: dict[str, Any]) -> Iterator[Any]:
    from vllm import LLM

    from orthorank.serving.vllm import probe
    from orthorank.serving.vllm_interface import interface

    interface.require(interface.BENCH)
    try:
        llm: Any = LLM(path, worker_extension_cls=probe.NAME, **arguments)
    except Exception as error:  # of whatever vLLM found wrong
        told = str(error).strip() or type(error).__name__
        raise OrthoRankError(f"vLLM does not start with the model {path!r}: {told}") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _leave() -> None:
    """Where engines ran in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), another one can be started afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _measure(
    engines: Mapping[str, Any], config: Any, settings: BenchSettings, common: dict[str, Any], step: OnStep
) -> VLLMReport:
    from orthorank.serving.vllm_interface import interface

    prompts = _prompts(config, settings)
    clock = clock_of(torch.device("cpu"))

    def timed(what: str, asked: list[Any]) -> dict[str, Timing]:
        seconds = in_turns(
            list(engines),
            lambda name: clock[1](lambda: _first_tokens(engines[name], asked)),
            rounds=settings.rounds,
            warmup=settings.warmup,
            on_round=lambda n, of: step(what, n, of),
        )
        return timings_of(seconds, len(asked) * settings.prompt_tokens)

    prefill, first = timed("prefill", prompts), timed("first token", prompts[:1])
    about = {name: engine.collective_rpc("orthorank_about")[0] for name, engine in engines.items()}
    one = next(iter(about.values()))
    report = SpeedReport(
        timings=prefill,
        clock=clock[0],
        device=one["device"],
        dtype=one["dtype"],
        threads=one["threads"],
        batch=settings.batch_size,
        prompt=settings.prompt_tokens,
        rounds=settings.rounds,
        warmup=settings.warmup,
    )
    ways = {name: each["attention"] for name, each in about.items()}
    return VLLMReport(settings, common, interface.version(), one["backend"], report, first, ways)


def _prompts(config: Any, settings: BenchSettings) -> list[dict[str, list[int]]]:
    """Random prompts that begin with the model's BOS, as those of a server do."""
    vocabulary, first = config.vocab_size, config.bos_token_id or 0
    seeded = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (settings.batch_size, settings.prompt_tokens - 1), generator=seeded)
    return [{"prompt_token_ids": [first, *rest]} for rest in drawn.tolist()]


def _first_tokens(llm: Any, prompts: list[Any]) -> None:
    """One token for each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate(prompts, params, use_tqdm=False)


def results_of(path: str, config: Any, variants: Mapping[str, Any], report: VLLMReport) -> dict[str, Any]:
    """The report with a row for each variant, as `orthorank.speed.bench_results.results_of` has them."""
    rows = [
        fields_of(name, plan, config, report) | {"attention": report.attention[name]} for name, plan in variants.items()
    ]
    plans = {name: plan.to_dict() for name, plan in variants.items() if plan is not None}
    about = {name: getattr(config, name) for name in ("model_type", "num_hidden_layers", "hidden_size")}
    model = {"name": path} | about | {"device": report.prefill.device, "dtype": report.prefill.dtype}
    return {"model": model, "rows": rows, "plans": plans, "bench": report.to_dict()}
