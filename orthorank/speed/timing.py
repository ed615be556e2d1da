"""How long a prefill takes: several variants of one model, interleaved in one process.

Machines drift: other processes come and go, clocks change. So the variants take turns, in an order that rotates from
round to round, and a speed-up is the median over the rounds of the ratio within a round. No variant is timed first and
compared with another timed minutes later.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError, check_integers
from orthorank.config import OrthoRankConfig
from orthorank.families.known import device_of
from orthorank.speed.prefill_ways import Ways

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnRound = Callable[[int, int], None]
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Timing:
    """One variant's times.

    Args:
        seconds: each round's time of one forward.
        tokens: tokens of one forward, ``batch * prompt length``.
        speedups: baseline's time over this variant's, round by round.
    """

    seconds: tuple[float, ...]
    tokens: int
    speedups: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a forward."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second at the median."""
        return self.tokens / self.median

    @property
    def spread(self) -> float:
        """Half of the range between the quartiles, as a share of the median."""
        return _half_quartile_range(self.seconds) / self.median

    @property
    def speedup(self) -> float:
        """Median of the ratios within a round: how many times faster than the baseline."""
        return statistics.median(self.speedups)

    @property
    def speedup_spread(self) -> float:
        """Half of the range between the quartiles of the ratios."""
        return _half_quartile_range(self.speedups)

    def to_dict(self) -> dict[str, Any]:
        """Times and the figures drawn from them, as JSON stores them."""
        figures = ("median", "tokens_per_second", "spread", "speedup", "speedup_spread")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in figures}


@dataclass(frozen=True)
class SpeedReport:
    """Timings by variant, and how they were taken.

    Args:
        timings: by the variant's name, in the order given; the first one is the baseline.
        clock: what measured the time, in words.
        device, dtype, threads: where the model ran; threads of PyTorch's CPU operators.
        batch, prompt: shape of the input in tokens.
        rounds: timed forwards of each variant; warmup: untimed ones before.
    """

    timings: dict[str, Timing]
    clock: str
    device: str
    dtype: str
    threads: int
    batch: int
    prompt: int
    rounds: int
    warmup: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON stores it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"timings": {name: timing.to_dict() for name, timing in self.timings.items()}}


@torch.inference_mode()
def time_prefill(
    model: "PreTrainedModel",
    variants: Mapping[str, OrthoRankConfig | None],
    input_ids: Tensor,
    *,
    rounds: int = 50,
    warmup: int = 1,
    logits_to_keep: int = 1,
    graph: bool = False,
    compiled: bool = False,
    on_round: OnRound | None = None,
) -> SpeedReport:
    """Time one forward over the prompt, without a cache, for each variant in turn (paper, section 4.1, throughput).

    Args:
        model: a causal language model without a plan applied; left as it was.
        variants: names and plans; None is the dense model. The first variant is the baseline of the speed-ups.
        input_ids: int64 ``[batch, tokens]``, prompts without padding; random ids do.
        rounds: timed forwards of each variant; warmup: untimed ones before.
        logits_to_keep: positions from the end whose logits are computed; 1 is what generation needs, 0 means all.
        graph: replay a CUDA graph of each variant's forward instead of calling the model; compiled: compile its layers,
            once for all that are alike. See `orthorank.speed.prefill_ways`.
        on_round: called after each round as ``on_round(done, rounds)``.

    Returns:
        The timings, by name.

    Raises:
        OrthoRankError: no variants, an argument out of range, or a plan that does not fit the model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> plans = {"dense": None, "plan": OrthoRankConfig(layers=[2])}
        >>> report = time_prefill(LlamaForCausalLM(config).eval(), plans, torch.arange(32)[None], rounds=3)
        >>> list(report.timings), report.timings["dense"].speedup, report.clock
        (['dense', 'plan'], 1.0, 'wall clock')
    """
    if not variants:
        raise OrthoRankError("variants is empty; give at least one, such as {'dense': None}")
    given = {"rounds": rounds, "warmup": warmup, "logits_to_keep": logits_to_keep}
    check_integers(given, rounds=1, warmup=0, logits_to_keep=0)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise OrthoRankError(f"input_ids has shape {list(input_ids.shape)}; it must be [batch, tokens]")
    device = device_of(model)
    prompt = input_ids.to(device)
    measure = clock_of(device)[1]

    ways = Ways(model, variants, prompt, logits_to_keep=logits_to_keep, graph=graph, compiled=compiled)

    def timed(name: str) -> float:
        with ways.running(name) as run:
            return measure(run)

    seconds = in_turns(list(variants), timed, rounds=rounds, warmup=warmup, on_round=on_round)
    return SpeedReport(
        timings=timings_of(seconds, prompt.numel()),
        clock=clock_of(device)[0],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batch=prompt.shape[0],
        prompt=prompt.shape[1],
        rounds=rounds,
        warmup=warmup,
    )


def in_turns(
    names: Sequence[str],
    run: Callable[[str], Measured],
    *,
    rounds: int,
    warmup: int = 1,
    on_round: OnRound | None = None,
) -> dict[str, list[Measured]]:
    """``run`` each name once a round, in an order that rotates from round to round; what it returned, by name.

    Args:
        names: what takes turns; run: called with a name.
        rounds: that are kept; warmup: rounds before, whose results are dropped.
        on_round: called after each kept round as ``on_round(done, rounds)``.

    Example:
        >>> order = []
        >>> in_turns(["a", "b"], order.append, rounds=2, warmup=0)
        {'a': [None, None], 'b': [None, None]}
        >>> order
        ['a', 'b', 'b', 'a']
    """
    kept: dict[str, list[Measured]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            measured = run(name)
            if number >= 0:
                kept[name].append(measured)
        if number >= 0 and on_round is not None:
            on_round(number + 1, rounds)
    return kept


def timings_of(seconds: Mapping[str, Sequence[float]], tokens: int) -> dict[str, Timing]:
    """`Timing` of each variant, whose first is the baseline; ``tokens`` were processed in each of the times."""
    baseline = next(iter(seconds.values()))
    return {
        name: Timing(tuple(own), tokens, tuple(base / each for base, each in zip(baseline, own, strict=True)))
        for name, own in seconds.items()
    }


def clock_of(device: torch.device) -> tuple[str, Callable[[Callable[[], None]], float]]:
    """What measures seconds on ``device``: its name, and a function from what is run to its time."""
    return ("CUDA events", _cuda_seconds) if device.type == "cuda" else ("wall clock", _wall_seconds)


def _wall_seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _cuda_seconds(run: Callable[[], None]) -> float:
    """Time on the device's own clock, from the first kernel to the last."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _half_quartile_range(values: tuple[float, ...]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
