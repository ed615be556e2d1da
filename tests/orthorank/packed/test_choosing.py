"""`orthorank.packed.selection` against a plain sort."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.packed.selection import PackedRows, below, choose, share
from orthorank.packed.steps import Step
from tests.orthorank.packed.served import step_of
from tests.orthorank.statement import Row, by_request, groups

NAN, INF = float("nan"), float("inf")
ROWS = st.lists(
    st.builds(Row, st.sampled_from([0, 0, 3, 17]), st.integers(0, 25), st.integers(0, 30)), min_size=1, max_size=4
)
SCORES = st.sampled_from([0.0, -0.0, 0.5, 0.5, 1.0, 2.0, 3.5, -1.0, INF, NAN])
THRESHOLD = 0.75


def plan_of(window: int | None = None, **fields: Any) -> OrthoRankConfig:
    how = {} if window is None else {"select": "window", "select_window": window}
    return OrthoRankConfig(**({"layers": [1], "keep_ratio": 0.4} | how | fields))


def threshold_plan(keep_last: int = 0) -> OrthoRankConfig:
    return plan_of(select="threshold", thresholds={1: THRESHOLD}, keep_last=keep_last)


def choose_share(step: Step, ranks: torch.Tensor, ratio: float) -> PackedRows:
    return choose(step, ranks, share(step, ratio))


def choose_below(step: Step, ranks: torch.Tensor, threshold: float, *, read_count: bool) -> PackedRows:
    return choose(step, ranks, below(step, threshold), read_count=read_count)


def drawn(data: st.DataObject, rows: list[Row], padding: int = 0) -> list[float]:
    total = sum(row.tokens for row in rows)
    return data.draw(st.lists(SCORES, min_size=total, max_size=total)) + [-INF] * padding


def assert_chosen(chosen: PackedRows, step: Step, rows: list[Row], expected: list[list[int]], room: int = 0) -> None:
    """``expected``: the rows that each request updates; ``room``: how many entries of -1 follow."""
    wanted = [row for request in expected for row in request]
    request_of = [i for i, row in enumerate(rows) for _ in range(row.tokens)]
    starts = step.cu_tokens.tolist()
    assert chosen.rows.tolist() == wanted + [-1] * room
    assert (
        chosen.positions.tolist()
        == [row - starts[request_of[row]] + rows[request_of[row]].cached for row in wanted] + [-1] * room
    )
    assert chosen.cu_selected.tolist() == [sum(map(len, expected[:i])) for i in range(len(rows) + 1)]
    assert {t.dtype for t in chosen} == {torch.int32}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(ROWS, st.integers(0, 4), st.none() | st.integers(1, 9), st.sampled_from([0, 3]), st.data())
def test_a_share_is_the_smallest(
    rows: list[Row], keep_last: int, window: int | None, padding: int, data: st.DataObject
) -> None:
    """Padding behind the last request has the smallest scores of all."""
    plan = plan_of(window, keep_last=keep_last)
    step, found, scores = step_of(plan, rows), groups(rows, keep_last, window), drawn(data, rows, padding)
    chosen = choose_share(step, torch.tensor(scores), 0.4)
    expected = by_request(lambda group: group.chosen(group.count(0.4), scores), found, len(rows))
    assert_chosen(chosen, step, rows, expected)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(ROWS, st.integers(0, 4), st.sampled_from([0, 3]), st.data())
def test_below_a_threshold(rows: list[Row], keep_last: int, padding: int, data: st.DataObject) -> None:
    step, found = step_of(threshold_plan(keep_last), rows), groups(rows, keep_last)
    scores = drawn(data, rows, padding)
    expected = by_request(lambda group: group.below(THRESHOLD, scores), found, len(rows))
    count = sum(map(len, expected))
    read, room = (choose_below(step, torch.tensor(scores), THRESHOLD, read_count=read) for read in (True, False))
    assert_chosen(read, step, rows, expected)
    assert_chosen(room, step, rows, expected, room=step.tokens - count)


@pytest.mark.parametrize("window", [None, 4])
def test_the_sink_is_never_chosen(window: int | None) -> None:
    """Not with the smallest score, nor as the last token of its prompt, nor as what a NaN leaves."""
    rows = [Row(0, 1, 1), Row(0, 3, 3), Row(0, 4, 9)]
    step = step_of(plan_of(window, keep_ratio=0.999, keep_last=3), rows)
    scores = torch.tensor([-INF, -INF, NAN, NAN, 0.0, 1.0, NAN, 2.0])
    assert choose_share(step, scores, 0.999).rows.tolist() == [2, 3, 5, 6, 7]
    step = step_of(threshold_plan(keep_last=3), rows)
    for read in (True, False):
        chosen = choose_below(step, torch.full((8,), -INF), THRESHOLD, read_count=read).rows
        assert chosen[chosen >= 0].tolist() == [2, 3, 5, 6, 7]


def test_a_chunk_in_the_middle_has_no_sink() -> None:
    step = step_of(plan_of(keep_last=0), [Row(8, 5, 40)])
    assert choose_share(step, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), 0.4).positions.tolist() == [8, 9]


def test_forced_tokens_come_before_smaller_scores() -> None:
    step = step_of(plan_of(keep_last=2), [Row(0, 6, 6)])
    assert choose_share(step, torch.tensor([0.0, 1.0, 2.0, 3.0, NAN, 9.0]), 0.4).rows.tolist() == [4, 5]


def test_nothing_to_choose() -> None:
    for rows in ([], [Row(0, 0, 7)], [Row(0, 2, 2)]):
        step = step_of(plan_of(keep_last=0), rows)
        chosen = choose_share(step, torch.zeros(step.tokens), 0.4)
        assert_chosen(chosen, step, rows, [[] for _ in rows])
    step = step_of(threshold_plan(), [Row(0, 2, 2)])
    assert_chosen(choose_below(step, torch.ones(2), THRESHOLD, read_count=False), step, [Row(0, 2, 2)], [[]], room=2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 5), st.integers(0, 6), st.data())
def test_aligned_chunks_choose_what_the_whole_prompt_does(
    prompt: int, window: int, keep_last: int, behind: int, data: st.DataObject
) -> None:
    """Also with tokens behind the prompt, which an engine computes again after a preemption."""
    plan, total = plan_of(window, keep_last=keep_last), prompt + behind
    scores = torch.tensor(data.draw(st.lists(SCORES, min_size=total, max_size=total)))
    inside = [end for end in range(window, prompt, window) if data.draw(st.booleans())]
    ends = [*inside, prompt + data.draw(st.integers(0, behind)), total]
    positions: list[int] = []
    for begin, end in zip([0, *ends], ends, strict=False):
        step = step_of(plan, [Row(begin, end - begin, prompt)])
        positions += choose_share(step, scores[begin:end].clone(), 0.4).positions.tolist()
    whole = choose_share(step_of(plan, [Row(0, total, prompt)]), scores.clone(), 0.4)
    assert positions == whole.positions.tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 4), st.lists(st.integers(1, 39), max_size=3), st.data())
def test_a_threshold_does_not_mind_the_chunks(
    prompt: int, keep_last: int, cuts: list[int], data: st.DataObject
) -> None:
    plan = threshold_plan(keep_last)
    scores = torch.tensor(data.draw(st.lists(SCORES, min_size=prompt, max_size=prompt)))
    ends = sorted({cut for cut in cuts if cut < prompt} | {prompt})
    positions: list[int] = []
    for begin, end in zip([0, *ends], ends, strict=False):
        step = step_of(plan, [Row(begin, end - begin, prompt)])
        positions += choose_below(step, scores[begin:end].clone(), THRESHOLD, read_count=True).positions.tolist()
    whole = choose_below(step_of(plan, [Row(0, prompt, prompt)]), scores.clone(), THRESHOLD, read_count=True)
    assert positions == whole.positions.tolist()


def test_a_ratio_that_the_step_does_not_know() -> None:
    step = step_of(plan_of(), [Row(0, 6, 6)])
    with pytest.raises(OrthoRankError, match=r"keep ratio 0\.5; this step was made for 0\.4"):
        choose_share(step, torch.zeros(6), 0.5)
