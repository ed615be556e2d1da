"""`orthorank.serving.vllm.requests`: prompt lengths and first tokens, as either of vLLM's runners tells them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orthorank import OrthoRankError
from orthorank.serving.vllm import hooks
from orthorank.serving.vllm.requests import RequestTable


def common(count: int, rows: list[int] | None, prefilling: Any = None) -> SimpleNamespace:
    return SimpleNamespace(num_reqs=count, req_idx=None if rows is None else np.array(rows), is_prefilling=prefilling)


def test_rows_that_the_model_was_told_of() -> None:
    table = RequestTable(4)
    table.add(2, [7, 8, 9])
    table.add(0, [5])
    table.add(3, None)
    assert table.rows(common(3, [2, 3, 0, 1])) == ([3, 0, 1], [7, 0, 5])
    table.add(2, [6, 6])  # another request in the same row
    assert table.rows(common(2, [1, 2])) == ([0, 2], [0, 6])
    table.add(2, [])
    assert table.rows(common(1, [2])) == ([0], [0])


def test_rows_of_the_runner_that_builds_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows past its requests are padding, whatever stands there."""
    batch = SimpleNamespace(
        num_reqs=2,
        req_ids=["a", "b"],
        num_prompt_tokens=np.array([3, 5, 9, 9]),
        token_ids_cpu=np.array([[7, 1], [8, 1], [9, 1], [4, 1]]),
    )
    requests = dict.fromkeys("ab", SimpleNamespace(sampling_params=None, pooling_params=None))
    monkeypatch.setattr(hooks._Running, "runner", SimpleNamespace(input_batch=batch, requests=requests))
    assert RequestTable(4).rows(common(3, None)) == ([3, 5, 0], [7, 8, 9])


def test_requests_that_say_how_many_tokens_are_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams, and answers that are sent again: what was generated is not selected from, by either runner."""
    said = SimpleNamespace(extra_args={"orthorank_prompt_tokens": 2})
    table = RequestTable(4)
    table.add(0, [7, 8, 9], said)
    table.add(1, [7], said)
    table.add(2, [7, 8, 9], SimpleNamespace(extra_args=None))
    assert table.rows(common(3, [0, 1, 2]))[0] == [2, 1, 3]
    batch = SimpleNamespace(
        num_reqs=2,
        req_ids=["a", "b"],
        num_prompt_tokens=np.array([3, 5, 9]),
        token_ids_cpu=np.array([[7, 1], [8, 1], [9, 1]]),
    )
    requests = {
        "a": SimpleNamespace(sampling_params=said, pooling_params=None),
        "b": SimpleNamespace(sampling_params=None, pooling_params=None),
    }
    monkeypatch.setattr(hooks._Running, "runner", SimpleNamespace(input_batch=batch, requests=requests))
    assert RequestTable(4).rows(common(2, None)) == ([2, 5], [7, 8])


def test_a_runner_that_keeps_them_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = SimpleNamespace(num_reqs=1, req_ids=["a"], num_prompt_tokens=[3], token_ids_cpu=np.array([[7]]))
    monkeypatch.setattr(hooks._Running, "runner", SimpleNamespace(input_batch=batch, requests={}))
    with pytest.raises(OrthoRankError, match="has a num_prompt_tokens that is a list, not an ndarray"):
        RequestTable(4).rows(common(1, None))


def test_metadata_that_no_runner_asked_for() -> None:
    assert hooks.runner() is None
    assert RequestTable(4).rows(common(3, None)) == ([0, 0, 0], [0, 0, 0])
    none = np.zeros(3, dtype=bool)
    assert RequestTable(4).rows(common(3, None, none)) == ([0, 0, 0], [0, 0, 0])


def test_prompts_of_a_runner_that_is_not_known() -> None:
    """Nobody told their lengths: without an error they would be served dense."""
    with pytest.raises(OrthoRankError, match="neither of the two this package knows has prompts in this step"):
        RequestTable(4).rows(common(2, None, np.array([False, True])))
