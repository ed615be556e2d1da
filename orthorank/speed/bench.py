"""Speed and memory of several variants of one model: prefill, time to first token, decoding, and from which length on.

Everything is interleaved (see `orthorank.speed.timing`): variants take turns, and a speed-up is the median over
the rounds of the ratio within a round.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError, check_integer, check_integers
from orthorank.config import OrthoRankConfig
from orthorank.families.known import device_of
from orthorank.hf.apply import apply
from orthorank.speed.memory import memory_meter, peak_bytes
from orthorank.speed.timing import SpeedReport, Timing, clock_of, in_turns, time_prefill, timings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchSettings:
    """What `run_bench` measures.

    Args:
        prompt_tokens: length of the prompts of random ids, at least 2.
        batch_size: prompts processed together.
        rounds: timed runs of each variant; warmup: untimed ones before.
        decode_tokens: tokens decoded after the first one; 0 leaves decoding out.
        lengths: prompt lengths among which the break-even is looked for; empty leaves it out.
        length_rounds: timed runs at each of these lengths.

    Raises:
        OrthoRankError: a number out of range.

    Example:
        >>> BenchSettings(prompt_tokens=512).lengths
        (64, 128, 256, 512)
    """

    prompt_tokens: int = 2048
    batch_size: int = 1
    rounds: int = 10
    warmup: int = 1
    decode_tokens: int = 32
    lengths: tuple[int, ...] | None = None
    length_rounds: int = 5

    def __post_init__(self) -> None:
        check_integers(vars(self), prompt_tokens=2, batch_size=1, rounds=1, warmup=0, decode_tokens=0, length_rounds=1)
        if self.lengths is None:
            powers = [2**n for n in range(6, 31) if 2**n < self.prompt_tokens]
            object.__setattr__(self, "lengths", (*powers, self.prompt_tokens))
        for length in self.lengths or ():
            check_integer("a prompt length in lengths", length, 2)
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths or ()))))


@dataclass(frozen=True)
class BenchReport:
    """What `run_bench` measured.

    Args:
        prefill: one forward over the prompt without a cache: the paper's throughput.
        first_token: the prompt into a cache and the first token chosen; decode: the tokens after it, by greedy
            choice, one at a time (None without ``decode_tokens``). By variant; the first one is the baseline.
        peak_memory: bytes held at most during one prefill, by variant; meter: what measured them. None: nothing does.
        by_length: prefill timings at each length; break_even: by variant, the smallest measured length from which on
            it was at least as fast as the baseline at every measured length; None: at none.
    """

    settings: BenchSettings
    prefill: SpeedReport
    first_token: dict[str, Timing]
    decode: dict[str, Timing] | None
    peak_memory: dict[str, int | None]
    meter: str | None
    by_length: dict[int, dict[str, Timing]]

    @property
    def break_even(self) -> dict[str, int | None]:
        """See above; the baseline is left out."""
        names = list(self.prefill.timings)[1:]
        return {name: break_even({n: t[name].speedup for n, t in self.by_length.items()}) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON stores it."""

        def timings(by_name: Mapping[str, Timing] | None) -> dict[str, Any] | None:
            return None if by_name is None else {name: timing.to_dict() for name, timing in by_name.items()}

        return {
            "settings": dataclasses.asdict(self.settings),
            "prefill": self.prefill.to_dict(),
            "first_token": timings(self.first_token),
            "decode": timings(self.decode),
            "peak_memory": self.peak_memory,
            "memory_meter": self.meter,
            "by_length": {str(length): timings(by_name) for length, by_name in self.by_length.items()},
            "break_even": self.break_even,
        }


def run_bench(
    model: "PreTrainedModel",
    variants: Mapping[str, OrthoRankConfig | None],
    settings: BenchSettings,
    *,
    on_step: OnStep | None = None,
) -> BenchReport:
    """Measure each variant of ``model`` on prompts of random token ids from a fixed seed (paper, section 4.1).

    Args:
        model: a causal language model without a plan applied; left as it was.
        variants: names and plans; None is the dense model. The first one is the baseline.
        settings: how many tokens, rounds and prompts of which lengths.
        on_step: called after each round as ``on_step(what, done, total)``.

    Returns:
        Timings, peak memory and break-even lengths.

    Raises:
        OrthoRankError: no variants, a plan does not fit, or the model was not made for prompts that long.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> small = BenchSettings(prompt_tokens=16, rounds=1, decode_tokens=2, lengths=(8, 16), length_rounds=1)
        >>> report = run_bench(LlamaForCausalLM(config).eval(), {"dense": None}, small)
        >>> report.decode["dense"].tokens, sorted(report.by_length)
        (2, [8, 16])
    """
    lengths = settings.lengths or ()
    _check_length(model, max(settings.prompt_tokens + settings.decode_tokens, *lengths, 0))
    step = on_step or (lambda what, done, total: None)
    prompt = random_prompt(model, settings.batch_size, settings.prompt_tokens)
    common: dict[str, Any] = {"rounds": settings.rounds, "warmup": settings.warmup}
    prefill = time_prefill(model, variants, prompt, on_round=lambda n, of: step("prefill", n, of), **common)
    generated = in_turns(
        list(variants),
        lambda name: _time_generation(model, variants[name], prompt, settings.decode_tokens),
        on_round=lambda n, of: step("first token and decoding", n, of),
        **common,
    )
    first = {name: [times[0] for times in each] for name, each in generated.items()}
    later = {name: [times[1] for times in each] for name, each in generated.items()}
    by_length = {}
    for number, length in enumerate(lengths):
        cut = random_prompt(model, settings.batch_size, length)
        by_length[length] = time_prefill(model, variants, cut, rounds=settings.length_rounds).timings
        step("lengths", number + 1, len(lengths))
    device = device_of(model)
    return BenchReport(
        settings=settings,
        prefill=prefill,
        first_token=timings_of(first, prompt.numel()),
        decode=timings_of(later, settings.batch_size * settings.decode_tokens) if settings.decode_tokens else None,
        peak_memory={name: _peak(model, plan, prompt, device) for name, plan in variants.items()},
        meter=memory_meter(device),
        by_length=by_length,
    )


def break_even(speedups: Mapping[int, float]) -> int | None:
    """The smallest length at which, and at all longer ones, the speed-up is at least 1; None if there is none.

    >>> break_even({64: 0.9, 128: 1.1, 256: 0.98, 512: 1.05, 1024: 1.2})
    512
    >>> break_even({64: 1.1, 128: 0.9}) is None
    True
    """
    found = None
    for length in sorted(speedups, reverse=True):
        if speedups[length] < 1:
            break
        found = length
    return found


def random_prompt(model: "PreTrainedModel", batch: int, tokens: int) -> Tensor:
    """``[batch, tokens]`` random ids from a fixed seed, on the model's device."""
    vocabulary = model.config.get_text_config().vocab_size
    seeded = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (batch, tokens), generator=seeded).to(device_of(model))


@torch.inference_mode()
def _time_generation(
    model: "PreTrainedModel", plan: OrthoRankConfig | None, prompt: Tensor, decode_tokens: int
) -> tuple[float, float]:
    """Seconds until the first token, and of the tokens after it."""
    from transformers import DynamicCache

    cache, clock = DynamicCache(config=model.config), clock_of(prompt.device)[1]
    # the name since transformers 5.24, and before
    name = "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"
    chosen = prompt[:, -1:]

    def forward(ids: Tensor) -> None:
        nonlocal chosen
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache}).logits
        chosen = logits[:, -1:].argmax(dim=-1)

    def decode() -> None:
        for _ in range(decode_tokens):
            forward(chosen)

    handle = None if plan is None else apply(model, plan)
    with nullcontext() if handle is None else handle:
        # as `generate()` does: the plan's keep_last tokens at the end of the prompt are always updated
        with nullcontext() if handle is None else handle.prefilling():
            first = clock(lambda: forward(prompt))
        with nullcontext() if handle is None else handle.decoding():
            later = clock(decode)
    return first, later


@torch.inference_mode()
def _peak(model: "PreTrainedModel", plan: OrthoRankConfig | None, prompt: Tensor, device: torch.device) -> int | None:
    with nullcontext() if plan is None else apply(model, plan):
        return peak_bytes(lambda: model(input_ids=prompt, use_cache=False, logits_to_keep=1), device)


def _check_length(model: "PreTrainedModel", tokens: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise OrthoRankError(
            f"prompts of {tokens} tokens (decoded ones included) are asked for and the model was made for at most "
            f"{longest}; lower prompt_tokens, decode_tokens or lengths"
        )


def variant_names(plans: Iterable[OrthoRankConfig]) -> list[str]:
    """A name for each plan that says what it is, made unique: ``orthorank``, ``layer pruning``, ``orthorank 2``.

    >>> variant_names([OrthoRankConfig(layers=[2]), OrthoRankConfig(layers=[2], keep_ratio=0)])
    ['orthorank', 'layer pruning']
    """
    names: list[str] = []
    for plan in plans:
        kind = "layer pruning" if plan.keep_ratio == 0 else "orthorank"
        same = sum(name.startswith(kind) for name in names)
        names.append(f"{kind} {same + 1}" if same else kind)
    return names


def read_plans(paths: Iterable[str] | None) -> dict[str, OrthoRankConfig]:
    """The plans at ``paths``, by `variant_names`.

    Raises:
        OrthoRankError: one cannot be read.
    """
    plans = [OrthoRankConfig.from_pretrained(path) for path in paths or ()]
    return dict(zip(variant_names(plans), plans, strict=True))
