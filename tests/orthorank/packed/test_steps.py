"""`orthorank.packed.steps`: segments and counts, against a statement of them and the Hugging Face path."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from orthorank import OrthoRankConfig
from orthorank.calls.reading import Phase, read_call
from orthorank.hf.selection import windows_of
from orthorank.packed.steps import make_step, segments_of, selects
from tests.orthorank.packed.served import CPU, step_of
from tests.orthorank.statement import Group, Row, groups

RATIOS = st.sampled_from([0.01, 0.1, 0.29, 1 / 3, 0.5, 0.9, 0.999])
WINDOWS = st.none() | st.integers(1, 20)
ROWS = st.builds(Row, cached=st.integers(0, 50), tokens=st.integers(0, 50), prompt=st.integers(0, 80))
FRESH = st.integers(0, 50).flatmap(lambda n: st.builds(Row, st.just(0), st.just(n), st.integers(0, 80)))


def plan_of(window: int | None = None, **fields: Any) -> OrthoRankConfig:
    how = {} if window is None else {"select": "window", "select_window": window}
    return OrthoRankConfig(**({"layers": [1, 2]} | how | fields))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(ROWS | FRESH, max_size=5), st.integers(0, 6), WINDOWS, RATIOS)
def test_segments_and_counts_as_stated(rows: list[Row], keep_last: int, window: int | None, ratio: float) -> None:
    stated = groups(rows, keep_last, window)
    at, found = 0, []
    for cached, tokens, prompt in rows:
        found += segments_of(at, tokens, cached, prompt, keep_last=keep_last, window=window) if tokens else []
        at += tokens
    assert [(s.row, s.tokens, s.position, s.all) for s in found] == [
        (g.rows[0], len(g.rows), g.positions[0], g.behind) for g in stated
    ]
    assert [s.has_sink for s in found] == [g.sink is not None for g in stated]
    assert [set(s.forced_rows) for s in found] == [set(g.rows) if g.behind else g.forced for g in stated]
    assert [s.count(ratio) for s in found] == [g.count(ratio) for g in stated]


def divided(group: Group) -> list[Group]:
    """The group, what is forced of it by itself."""
    rest = len(group.rows) - len(group.forced)
    if group.behind or not 0 < len(group.forced) < len(group.rows):
        return [group]
    return [
        Group(group.request, False, group.rows[:rest], group.positions[:rest]),
        Group(group.request, True, group.rows[rest:], group.positions[rest:]),
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(ROWS | FRESH, max_size=5), st.integers(0, 3), WINDOWS, st.lists(RATIOS, min_size=2, max_size=2))
def test_the_step_holds_what_the_segments_say(
    rows: list[Row], keep_last: int, window: int | None, ratios: list[float]
) -> None:
    plan = plan_of(window, keep_last=keep_last, keep_ratio=ratios[0], keep_ratios={2: ratios[1]})
    step, stated = step_of(plan, rows), groups(rows, keep_last, window)
    total = sum(row.tokens for row in rows)
    assert (step.tokens, step.requests) == (total, len(rows))
    assert step.cu_tokens.tolist() == [sum(row.tokens for row in rows[:i]) for i in range(len(rows) + 1)]
    pieces = [piece for group in stated for piece in divided(group)]
    assert step.cu_segments.tolist() == [*(piece.rows[0] for piece in pieces), total]
    assert step.offsets.tolist() == [piece.positions[0] for piece in pieces]
    assert step.sink_positions.tolist() == [-1 if piece.sink is None else 0 for piece in pieces]
    assert step.first_segment.tolist() == [
        sum(piece.request < request for piece in pieces) for request in range(len(rows) + 1)
    ]
    assert step.sink_slots.tolist() == [0] * len(pieces)
    assert step.workspace.tolist() == [0] * max(1, len(pieces))
    assert set(step.counts) == set(step.selected) == set(ratios)
    for ratio, counts in step.counts.items():
        shares = [piece.count(ratio) for piece in pieces]
        for group in stated:
            own = [i for i, piece in enumerate(pieces) if piece.rows[0] in group.rows]
            if len(own) == 2:  # what is forced, and the rest of the share
                shares[own[0]] = group.count(ratio) - len(group.forced)
        assert counts.tolist() == shares
        assert int(counts.sum()) == step.selected[ratio] == sum(group.count(ratio) for group in stated)
    assert step.forced.tolist() == [], "their segments say it"
    assert step.first_positions.tolist() == [-1 if piece.positions[0] else 0 for piece in pieces]
    integers = step.cu_tokens, step.cu_segments, step.offsets, step.sink_positions, step.first_positions
    for tensor in (*integers, step.first_segment):
        assert tensor.dtype == torch.int32
    assert (step.forced.dtype, step.sink_slots.dtype) == (torch.int64, torch.int64)


def hugging_face(row: Row, keep_last: int, window: int | None, ratio: float) -> int:
    """How many tokens the Hugging Face path updates in a call that holds ``row`` alone."""
    cache = SimpleNamespace(get_seq_length=lambda: row.cached)
    phase = Phase(prompt=row.prompt, keep_last=keep_last)
    call = read_call((1, row.tokens), CPU, phase, {"past_key_values": cache})
    if call.decodes_only:
        return row.tokens
    if window is None:
        return int(call.tokens_updated(ratio))
    windows = windows_of(call, window, ratio, CPU)
    assert windows.most == int(windows.counts.sum())
    return windows.most


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(0, 12), st.integers(0, 5), WINDOWS, RATIOS)
def test_whole_prompts_count_as_on_hugging_face(
    prompt: int, behind: int, keep_last: int, window: int | None, ratio: float
) -> None:
    row = Row(0, prompt + behind, prompt)  # with what was generated, as after a preemption
    plan = plan_of(window, keep_last=keep_last, keep_ratio=ratio)
    assert step_of(plan, [row]).selected[ratio] == hugging_face(row, keep_last, window, ratio)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(0, 4), st.integers(1, 60), st.integers(0, 6), st.integers(0, 5), RATIOS)
def test_aligned_chunks_count_as_on_hugging_face(
    window: int, chunks: int, rest: int, behind: int, keep_last: int, ratio: float
) -> None:
    row = Row(chunks * window, rest + behind, chunks * window + rest)
    plan = plan_of(window, keep_last=min(keep_last, rest), keep_ratio=ratio)
    assert step_of(plan, [row]).selected[ratio] == hugging_face(row, plan.keep_last, window, ratio)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 90), st.integers(0, 6), st.integers(1, 20), RATIOS, st.data())
def test_aligned_chunks_have_the_segments_of_the_whole(
    prompt: int, keep_last: int, window: int, ratio: float, data: st.DataObject
) -> None:
    """Also where the tokens that are forced lie in several chunks."""
    ends = data.draw(st.sets(st.sampled_from([*range(window, prompt, window), prompt])).map(sorted))
    ends = [*(end for end in ends if end < prompt), prompt]
    chunked = [
        (segment.position, segment.tokens, segment.forced, segment.count(ratio))
        for begin, end in zip([0, *ends], ends, strict=False)
        for segment in segments_of(0, end - begin, begin, prompt, keep_last=keep_last, window=window)
    ]
    whole = segments_of(0, prompt, 0, prompt, keep_last=keep_last, window=window)
    assert chunked == [(s.position, s.tokens, s.forced, s.count(ratio)) for s in whole]


def test_a_prompt_updates_a_multiple_its_last_tokens_among_them() -> None:
    plan = plan_of(keep_ratio=0.25, keep_last=2, keep_multiple=16)
    step = step_of(plan, [Row(0, 100, 100), Row(0, 9, 9)])  # 25 and 2 without it
    assert step.counts[0.25].tolist() == [30, 2, 6, 2], "those before the last two, then these"
    assert step.selected[0.25] == 32 + 8


@pytest.mark.parametrize("window", [None, 16])
def test_tokens_behind_the_prompt_are_all_updated(window: int | None) -> None:
    """A single generated token, several, a prompt's end with some behind it, and all of it again after a preemption."""
    plan = plan_of(window, keep_ratio=0.25, keep_last=2)
    step = step_of(plan, [Row(40, 1, 40), Row(70, 5, 40), Row(36, 8, 40), Row(0, 48, 40)])
    assert step.counts[0.25].tolist() == (
        [1, 5, 0, 2, 4, 8, 2, 8] if window is None else [1, 5, 0, 2, 4, 4, 4, 0, 2, 8]
    )
    assert step.sink_positions.tolist().count(0) == 1


def test_a_row_without_a_prompt_is_generated_throughout() -> None:
    segments = segments_of(3, 7, 0, 0, keep_last=2, window=4)
    assert [(s.row, s.tokens, s.position, s.all, s.has_sink, s.count(0.1)) for s in segments] == [
        (3, 7, 0, True, False, 7)
    ]


def test_prompts_below_the_least_are_updated_throughout() -> None:
    """Whole or in chunks, by the whole prompt's length; or where the caller says so."""
    plan = plan_of(keep_ratio=0.25, keep_last=0, min_prompt=8)
    step = step_of(plan, [Row(0, 7, 7), Row(0, 8, 8), Row(0, 3, 7), Row(0, 4, 8), Row(0, 20, -20)])
    assert step.counts[0.25].tolist() == [7, 2, 3, 1, 20]
    assert step.sink_positions.tolist() == [-1, 0, -1, 0, -1]
    assert (step.first_positions.tolist(), step.prompt_tokens) == ([0] * 5, 8 + 4)


def test_the_first_token_alone_is_the_sink() -> None:
    """Which no layer updates, though it is the prompt's last token, too."""
    assert step_of(plan_of(keep_last=1), [Row(0, 1, 1)]).selected == {1 / 3: 0}
    assert step_of(plan_of(keep_last=1), [Row(4, 1, 5)]).selected == {1 / 3: 1}
    assert step_of(plan_of(8, keep_last=3), [Row(0, 2, 2)]).selected == {1 / 3: 1}


def test_only_the_selecting_layers_of_a_mixed_plan_are_counted() -> None:
    plan = OrthoRankConfig(layers=[1, 2, 3, 4], keep_ratio=0.5, keep_ratios={2: 0, 3: 1, 4: 0.25})
    assert step_of(plan, [Row(0, 8, 8)]).selected == {0.25: 2, 0.5: 4}
    dense = OrthoRankConfig(layers=[1, 2], keep_ratio=1.0, keep_ratios={2: 0})
    assert step_of(dense, [Row(0, 8, 8)]).selected == {}


def test_nothing_at_all() -> None:
    step = make_step(plan_of(), [0], [], [], [], CPU)
    assert (step.tokens, step.requests, step.selected) == (0, 0, {1 / 3: 0})
    assert step.cu_tokens.tolist() == step.cu_segments.tolist() == step.first_segment.tolist() == [0]
    empty = step_of(plan_of(), [Row(0, 0, 5), Row(5, 0, 5), Row(0, 0, 0)])
    assert empty.cu_segments.tolist() == [0]
    assert empty.first_segment.tolist() == [0] * 4


def test_threshold_forces_what_lies_behind_the_prompt() -> None:
    """There it has to be said: no count takes them. With counts, segments of their own say it."""
    rows = [Row(0, 6, 4), Row(9, 1, 5), Row(0, 3, 9)]
    plan = plan_of(select="threshold", thresholds={1: 0.5, 2: 0.5}, keep_last=2)
    assert step_of(plan, rows).forced.tolist() == [2, 3, 4, 5, 6]
    assert step_of(plan_of(keep_last=2), rows).forced.tolist() == []


def test_which_requests_select() -> None:
    assert selects([5, 1, 1, 0, 3, 4], [0, 4, 5, 0, 9, 2], [5, 5, 5, 5, 5, 5]) == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="zip"):
        selects([1], [0, 0], [1])


def test_no_position_wraps_around() -> None:
    last = 2**31 - 2
    step = step_of(plan_of(64, keep_last=1), [Row(last - 70, 70, last)])
    assert step.offsets.tolist() == [last - 70, last - last % 64, last - 1]
    with pytest.raises(OverflowError):
        step_of(plan_of(), [Row(2**31, 3, 2**31 + 3)])


class Copies(TorchDispatchMode):
    """How often data went from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [x for x in args if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        if given and isinstance(result, torch.Tensor) and result.device.type != "cpu":
            self.waits.append(not kwargs.get("non_blocking", False))
        return result


def test_one_copy_that_the_host_does_not_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device whatever reads a number raises."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.numel()) or x)  # needs a GPU
    plan = OrthoRankConfig(layers=[1, 2, 3], keep_ratio=0.5, keep_ratios={2: 0.25})
    with Copies() as copies:
        step = make_step(plan, [0, 9, 10, 30], [0, 7, 64], [9, 7, 99], [0, 0, 1], torch.device("meta"))
    assert copies.waits == [False]
    assert len(pinned) == 1
    assert step.selected == {0.25: 2 + 1 + 5, 0.5: 4 + 1 + 10}
    assert {t.device.type for t in (step.cu_tokens, step.forced, step.sink_slots, *step.counts.values())} == {"meta"}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(ROWS, max_size=5))
def test_every_tensor_begins_where_kernels_expect_it(rows: list[Row]) -> None:
    """At 16 bytes: Triton compiles anew for each mixture of pointers that do and do not."""
    step = step_of(plan_of(keep_ratios={2: 0.1}), rows)
    tensors = step.cu_tokens, step.cu_segments, step.offsets, step.sink_positions, step.first_positions
    for tensor in (*tensors, step.first_segment, *step.counts.values()):
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0
        assert tensor.is_contiguous()
