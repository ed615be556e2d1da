"""`orthorank.integrations.vllm.requests`: prompt lengths and first tokens, as either of vLLM's runners tells them."""

from types import SimpleNamespace

import numpy as np
import pytest

from orthorank.integrations.vllm import hooks
from orthorank.integrations.vllm.requests import RequestTable


def common(count: int, rows: list[int] | None) -> SimpleNamespace:
    return SimpleNamespace(num_reqs=count, req_idx=None if rows is None else np.array(rows))


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
        num_prompt_tokens=np.array([3, 5, 9, 9]),
        token_ids_cpu=np.array([[7, 1], [8, 1], [9, 1], [4, 1]]),
    )
    monkeypatch.setattr(hooks._Running, "runner", SimpleNamespace(input_batch=batch))
    assert RequestTable(4).rows(common(3, None)) == ([3, 5, 0], [7, 8, 9])


def test_metadata_that_no_runner_asked_for() -> None:
    assert hooks.runner() is None
    assert RequestTable(4).rows(common(3, None)) == ([0, 0, 0], [0, 0, 0])
