"""One step of a serving engine: which of its tokens a layer may select from, and how many, known on the host.

A step holds the new tokens of many requests, one after another: whole prompts, chunks of them, single generated tokens.
Each request is cut into *segments*, and a segment selects by itself:

    a prompt, or its chunk        one segment, or one for each window of W positions that it touches
    a prompt's last tokens        one segment, of which every token is updated, where they are forced; by a threshold,
                                  which takes no numbers, they are named one by one
    the tokens behind the prompt  one segment like that: generated tokens pass all layers, also when a preempted request
                                  is computed again; and prompts below the plan's ``min_prompt``

Every number comes from the lengths of prompts and caches, so no layer waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from orthorank.packed import plans
from orthorank_kernels import keep_count

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig

ALIGNED = 4  # int32 in 16 bytes


@dataclass(frozen=True)
class Segment:
    """Tokens of one request that select together.

    Args:
        row: the first of them among all tokens of the step; tokens: how many.
        position: of the first of them in its request.
        forced: so many at its end are updated in any case; all: all of them are.
        apart: so many forced tokens behind it, counted with it, are a segment of their own.
        multiple: the plan's ``keep_multiple``.
    """

    row: int
    tokens: int
    position: int
    forced: int = 0
    all: bool = False
    apart: int = 0
    multiple: int = 1

    @property
    def has_sink(self) -> bool:
        """Whether the request's first token is among them."""
        return self.position == 0 and not self.all

    def count(self, ratio: float) -> int:
        """How many a layer of that keep ratio updates."""
        if self.all:
            return self.tokens
        tokens, forced = self.tokens + self.apart, self.forced + self.apart
        together = keep_count(tokens, ratio, forced, sink_inside=self.has_sink, multiple=self.multiple)
        return together - self.apart

    def divided(self) -> "list[Segment]":
        """The same tokens, those forced at the end by themselves: so each segment selects what scores least, or all."""
        if self.all or not 0 < self.forced < self.tokens:
            return [self]
        rest = self.tokens - self.forced
        return [
            replace(self, tokens=rest, forced=0, apart=self.forced),
            Segment(self.row + rest, self.forced, self.position + rest, all=True),
        ]

    @property
    def forced_rows(self) -> range:
        """Rows that are updated whatever they score."""
        end = self.row + self.tokens
        return range(self.row if self.all else end - self.forced, end)


def segments_of(
    row: int, tokens: int, cached: int, prompt: int, *, keep_last: int = 0, window: int | None = None, multiple: int = 1
) -> list[Segment]:
    """The segments of one request.

    Args:
        row: of its first token in the step; tokens: how many it has there.
        cached: its tokens that were computed before; prompt: length of its prompt.
        keep_last: how many tokens at the prompt's end are always updated, counted inside the keep ratio.
        window: tokens of a window of ``select="window"``; None: the chunk is one segment.
        multiple: the plan's ``keep_multiple``.

    Example:
        A chunk of 100 tokens that starts at position 64, with 150 tokens in the prompt: two windows of 64, of which the
        prompt ends the second, and 14 tokens behind it.

        >>> pieces = segments_of(0, 100, 64, 150, keep_last=1, window=64)
        >>> [(s.row, s.tokens, s.position, s.forced, s.all) for s in pieces]
        [(0, 64, 64, 0, False), (64, 22, 128, 1, False), (86, 14, 150, 0, True)]
    """
    end = cached + tokens
    inside = min(max(prompt, cached), end)  # where the prompt's part of the chunk ends
    edges = [cached, inside]
    if window is not None and inside > cached:
        edges[1:1] = range(cached - cached % window + window, inside, window)
    pieces = [
        Segment(row + a - cached, b - a, a, forced=min(b - a, max(0, b - (prompt - keep_last))), multiple=multiple)
        for a, b in pairwise(edges)
        if b > a
    ]
    if end > inside:
        pieces.append(Segment(row + inside - cached, end - inside, inside, all=True))
    return pieces


@dataclass(frozen=True)
class Step:
    """A step as the selecting layers need it; tensors are on the device.

    Args:
        tokens: new tokens of all requests; requests: how many.
        cu_tokens: int32 ``[requests + 1]``, where each request begins among the tokens.
        cu_segments: int32 ``[segments + 1]``, where each segment does.
        offsets: int32 ``[segments]``, position of each segment's first token in its request.
        sink_positions: int32 ``[segments]``, 0 where the request's first token is in it and is not updated, else -1.
        first_positions: int32 ``[segments]``, 0 where it is in it at all, else -1: no map is for it.
        first_segment: int32 ``[requests + 1]``, number of each request's first segment.
        workspace: int32 zeros ``[segments or more]`` for `rms_norm_select`, which leaves them zero.
        counts: for each keep ratio, int32 ``[segments]``: tokens that are updated.
        selected: for each keep ratio the sum of these, on the host.
        forced: int64 ``[n]``, rows that are updated whatever they score, where that is not said by segments: a
            threshold takes no number of tokens.
        sink_slots: int64 ``[segments]``, where the bank holds the sink of each segment's request.
        prompt_tokens: how many of the tokens are of prompts; the others were generated.
    """

    tokens: int
    requests: int
    cu_tokens: Tensor
    cu_segments: Tensor
    offsets: Tensor
    sink_positions: Tensor
    first_positions: Tensor
    first_segment: Tensor
    workspace: Tensor
    counts: dict[float, Tensor]
    selected: dict[float, int]
    forced: Tensor
    sink_slots: Tensor
    prompt_tokens: int = 0


def judged(plan: "OrthoRankConfig", prompts: Sequence[int]) -> list[int]:
    """Lengths of prompts, negative where every layer computes them: so before, or below the plan's ``min_prompt``.

    Example:
        >>> from orthorank import OrthoRankConfig
        >>> judged(OrthoRankConfig(layers=[2], min_prompt=16), [15, 16, -20, 0])
        [-15, 16, -20, 0]
    """
    return [-prompt if 0 < prompt < plan.min_prompt else prompt for prompt in prompts]


def selects(lengths: Sequence[int], cached: Sequence[int], prompts: Sequence[int]) -> list[bool]:
    """Which requests have tokens of their prompts in this step."""
    return [length > 0 and before < prompt for length, before, prompt in zip(lengths, cached, prompts, strict=True)]


def make_step(
    plan: "OrthoRankConfig",
    starts: Sequence[int],
    cached: Sequence[int],
    prompts: Sequence[int],
    sink_slots: Sequence[int],
    device: torch.device,
) -> Step:
    """The step of these requests. One copy to the device, which the host does not wait for.

    Args:
        plan: how tokens are selected. ``keep_last`` holds for every prompt; one of fewer than ``min_prompt`` tokens is
            updated throughout, like generated tokens.
        starts: ``[requests + 1]``, where each request begins among the new tokens.
        cached: ``[requests]``, tokens computed before.
        prompts: ``[requests]``, tokens of the whole prompts, chunks that are still to come included. Negative: of so
            many, and updated throughout whatever ``min_prompt`` is.
        sink_slots: ``[requests]``, where the bank holds the sink of each; any number where nothing is selected.
        device: where the layers run.

    Raises:
        OrthoRankError: the plan asks for what layers over a paged cache do not do: see `plans.obstacles`.
    """
    plans.check(plan)
    segments: list[Segment] = []
    first_segment, slots, prompt_tokens = [0], list[int](), 0
    below = plan.select == "threshold"
    for (begin, end), before, prompt, slot in zip(
        pairwise(starts), cached, judged(plan, prompts), sink_slots, strict=True
    ):
        if end > begin:
            own = segments_of(
                begin,
                end - begin,
                before,
                prompt,
                keep_last=plan.keep_last,
                window=plan.select_window,
                multiple=plan.keep_multiple,
            )
            prompt_tokens += sum(segment.tokens for segment in own if not segment.all)
            segments += own if below else [part for segment in own for part in segment.divided()]
        slots += [slot] * (len(segments) - first_segment[-1])
        first_segment.append(len(segments))
    ratios = sorted({plan.ratio(layer) for layer in plan.selecting})
    counts = {ratio: [s.count(ratio) for s in segments] for ratio in ratios}
    forced = [row for s in segments for row in s.forced_rows] if below else []
    tensors = _on_device(
        [
            starts,
            [*(s.row for s in segments), starts[-1]],
            [s.position for s in segments],
            [0 if s.has_sink else -1 for s in segments],
            [0 if s.position == 0 else -1 for s in segments],
            first_segment,
            [0] * max(1, len(segments)),
            forced,
            slots,
            *counts.values(),
        ],
        device,
    )
    return Step(
        tokens=starts[-1],
        requests=len(cached),
        cu_tokens=tensors[0],
        cu_segments=tensors[1],
        offsets=tensors[2],
        sink_positions=tensors[3],
        first_positions=tensors[4],
        first_segment=tensors[5],
        workspace=tensors[6],
        counts=dict(zip(ratios, tensors[9:], strict=True)),
        selected={ratio: sum(each) for ratio, each in counts.items()},
        forced=tensors[7].long(),
        sink_slots=tensors[8].long(),
        prompt_tokens=prompt_tokens,
    )


def _on_device(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """int32 tensors of the lists, brought to the device together.

    Each begins at 16 bytes: Triton compiles a kernel anew for every mixture of pointers that do and do not.
    """
    ends = list(accumulate((-(-len(values) // ALIGNED) * ALIGNED for values in lists), initial=0))
    flat = np.zeros(ends[-1], dtype=np.int32)
    for begin, values in zip(ends[:-1], lists, strict=True):
        flat[begin : begin + len(values)] = np.asarray(values, dtype=np.int32)  # which does not wrap around
    sent = torch.from_numpy(flat)
    if device.type != "cpu":
        sent = sent.pin_memory()
    sent = sent.to(device, non_blocking=True)
    return [sent.narrow(0, begin, len(values)) for begin, values in zip(ends[:-1], lists, strict=True)]
