"""`orthorank.serving.vllm.rules`: where chunks end, and what may be used again, against the stated groups."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank import OrthoRankError
from orthorank.serving.vllm.rules import (
    check_request,
    chunk_tokens,
    dense_salt,
    prompt_tokens,
    reusable_tokens,
    same_tokens,
    without_layers,
)
from tests.orthorank.statement import Group, Row, groups


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(0, 20), st.integers(1, 40), st.data())
def test_chunks_end_at_windows_or_behind_the_prompt(prompt: int, behind: int, window: int, data: st.DataObject) -> None:
    """With any room in a step, a window's at least now and then; the tokens behind are there after a preemption."""
    total, start, waited = prompt + behind, 0, 0
    while start < total:
        room = data.draw(st.integers(1, 3 * window)) if waited < 3 else window
        tokens = chunk_tokens(start, min(room, total - start), prompt, window)
        assert 0 <= tokens <= room
        end = start + tokens
        assert end % window == 0 or end >= prompt
        fitting = [e for e in range(start, min(start + room, total) + 1) if e % window == 0 or e >= prompt]
        assert end == max(fitting, default=start), "as many as there is room for"
        start, waited = end, waited + 1 if tokens == 0 else 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 200), st.integers(1, 64), st.integers(1, 40))
def test_a_chunk_from_inside_a_window_ends_it(start: int, tokens: int, window: int) -> None:
    taken = chunk_tokens(start, tokens, 10**6, window)
    assert taken == max([n for n in range(tokens + 1) if (start + n) % window == 0], default=0)


def test_generated_tokens_are_not_held_back() -> None:
    assert [chunk_tokens(start, 1, 300, 64) for start in (300, 301, 299)] == [1, 1, 1]
    assert chunk_tokens(299, 5, 300, 64) == 5


def kinds(found: list[Group]) -> list[tuple[object, ...]]:
    """For each token, everything that its selection depends on beside the scores."""
    return [
        (tuple(g.positions), p - g.positions[0], len(g.forced), g.rows[i] in g.forced)
        for g in found
        for i, p in enumerate(g.positions)
    ]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 120), st.integers(0, 9), st.integers(1, 40))
def test_what_may_be_used_again_is_what_a_longer_prompt_computes(prompt: int, keep_last: int, window: int) -> None:
    short = kinds(groups([Row(0, prompt, prompt)], keep_last, window))
    long = kinds(groups([Row(0, 500, 500)], keep_last, window))
    same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), prompt)
    assert reusable_tokens(prompt, keep_last, window) == same


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 60), st.integers(0, 9))
def test_by_a_threshold_it_is_what_is_not_forced(prompt: int, keep_last: int) -> None:
    found = groups([Row(0, prompt, prompt)], keep_last)
    free = [row for group in found for row in group.rows if row not in group.forced]
    assert reusable_tokens(prompt, keep_last, None) == len(free)
    assert free == list(range(len(free)))


@pytest.mark.parametrize("said", ["9", 0, -1, 2.0, True, [3]])
def test_what_is_no_number_of_prompt_tokens(said: object) -> None:
    """Refused where a request is taken; where it came another way, its whole prompt is one."""
    extra = {"orthorank_prompt_tokens": said}
    with pytest.raises(OrthoRankError, match="it must be the number of the prompt's own tokens, at least 1"):
        check_request(extra)
    assert prompt_tokens(12, SimpleNamespace(extra_args=extra)) == 12


def test_prompt_tokens() -> None:
    for extra in (None, {}, {"other": 3}, {"orthorank_prompt_tokens": 3}):
        check_request(extra)
    assert prompt_tokens(12, SimpleNamespace(extra_args={"other": 3})) == 12
    assert prompt_tokens(12, SimpleNamespace()) == 12
    assert prompt_tokens(2, SimpleNamespace(extra_args={"orthorank_prompt_tokens": 3})) == 2


def test_weights_of_removed_layers_are_passed_over() -> None:
    names = [
        *("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "layers.1.attention.wq.weight"),
        *("model.layers.11.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"),
    ]
    kept = [name for name, _ in without_layers(zip(names, names, strict=True), (1, 2))]
    assert kept == [names[0], names[3], names[5]]
    norms = ["model.layers.1.input_layernorm.weight", "layers.1.attention_norm.weight"]
    others = ["model.layers.2.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"]
    given = [(name, name) for name in [*names, *norms, *others]]
    assert [name for name, _ in without_layers(given, (1, 2), (1,))] == kept + norms
    assert list(without_layers(zip(names, names, strict=True), ())) == list(zip(names, names, strict=True))


@pytest.mark.parametrize("said", ["true", 2, -1, [True]])
def test_what_is_no_switch(said: object) -> None:
    with pytest.raises(OrthoRankError, match=r"orthorank_dense is .*; it must be true"):
        check_request({"orthorank_dense": said})


def test_dense_prompts() -> None:
    """By parameters of sampling or of pooling; the number of tokens that are the prompt's own is kept."""
    for said in (True, 1, 1.0):  # what JSON may make of true
        check_request({"orthorank_dense": said})
        assert prompt_tokens(12, SimpleNamespace(extra_args={"orthorank_dense": said})) == -12
    assert prompt_tokens(12, SimpleNamespace(extra_kwargs={"orthorank_dense": True})) == -12
    assert prompt_tokens(12, SimpleNamespace(extra_args={"orthorank_dense": True, "orthorank_prompt_tokens": 5})) == -5
    for said in (False, 0, None):
        check_request({"orthorank_dense": said})
        assert prompt_tokens(12, SimpleNamespace(extra_args={"orthorank_dense": said})) == 12
    assert chunk_tokens(0, 100, prompt=-300, window=64) == 100  # no window has to be whole


def test_nobody_takes_the_salt_of_dense_prompts() -> None:
    salts = [dense_salt(salt) for salt in (None, "a", "b")]
    assert len(set(salts)) == 3
    check_request(None, "a user's")
    for salt in salts:
        with pytest.raises(OrthoRankError, match=f"cache_salt is '{salt}'; what begins with"):
            check_request(None, salt)


@pytest.mark.parametrize(
    ("salt", "extra", "least", "session", "same"),
    [
        (None, {}, 0, None, 96),
        ("a user's", {}, 100, None, 96),
        (dense_salt("a user's"), {"orthorank_dense": True}, 0, None, sys.maxsize),
        (dense_salt(None), {"orthorank_dense": True}, 0, 70, 64),  # later inputs may be of the other kind
        (dense_salt(None), {}, 101, None, sys.maxsize),
        (None, {"orthorank_prompt_tokens": 70}, 0, None, 64),
        (None, {"orthorank_dense": True}, 0, None, 0),  # straight to the engine: no front end gave it its salt
        ("a user's", {}, 101, None, 0),
        (None, {"orthorank_prompt_tokens": 70}, 71, None, 0),
        (dense_salt(None), {}, 0, None, 0),
    ],
)
def test_blocks_are_of_one_kind(
    salt: str | None, extra: dict[str, Any], least: int, session: int | None, same: int
) -> None:
    """Of a prompt of 100 tokens. The salt is what keeps dense ones apart, so without it none is used again."""
    plan = SimpleNamespace(min_prompt=least, keep_last=1, select_window=32)
    params = SimpleNamespace(extra_args=extra)
    request = SimpleNamespace(num_prompt_tokens=100, sampling_params=params, pooling_params=None, cache_salt=salt)
    if session is not None:
        request.orthorank_prompt = session
    assert same_tokens(request, plan) == same
