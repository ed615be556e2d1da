"""State files that no search has written are refused when they are read, not when they are used."""

import json
from pathlib import Path
from typing import Any

import pytest

from orthorank.common.errors import OrthoRankError
from orthorank.search.one_shot import ScoreState
from orthorank.search.state import SearchState

GREEDY = {
    "candidates": [1, 2, 3],
    "rounds": 2,
    "fingerprint": "f",
    "chosen": [2],
    "losses": [3.5],
    "current": {"1": 3.6, "3": None},
    "known": {"1": 3.6},
    "fast": True,
    "windows": 4,
    "batch_size": 1,
    "sums": {"1": [1.0, 2.0]},
    "first": {"1": 1.0},
    "schema": 2,
}
SCORES = {"candidates": [1, 2, 3], "fingerprint": "f", "scores": {"1": 3.5, "3": None}, "batch_size": None}


def write(folder: Path, words: str) -> str:
    (folder / "state.json").write_text(words)
    return str(folder / "state.json")


def test_whole_states_are_read(tmp_path: Path) -> None:
    state = SearchState.load(write(tmp_path, json.dumps(GREEDY)))
    assert (state.chosen, state.current, state.batch_size) == ([2], {1: 3.6, 3: None}, 1)
    scores = ScoreState.load(write(tmp_path, json.dumps(SCORES)))
    assert scores.scores == {1: 3.5, 3: None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("candidates", "abc"),
        ("candidates", [1, 1]),
        ("candidates", [-1]),
        ("candidates", [True]),
        ("rounds", 0),
        ("rounds", "2"),
        ("chosen", [9]),
        ("chosen", ["2"]),
        ("losses", []),
        ("losses", ["3.5"]),
        ("losses", [float("nan")]),
        ("losses", {"2": 3.5}),
        ("current", {"1": "x"}),
        ("current", {"1": float("inf")}),
        ("current", {"9": 1.0}),
        ("current", {"one": 1.0}),
        ("current", []),
        ("known", {"1": [1.0]}),
        ("sums", {"1": 2.0}),
        ("sums", {"1": ["2"]}),
        ("first", {"9": 2.0}),
        ("windows", 0),
        ("batch_size", "1"),
        ("batch_size", -2),
        ("batch_size", True),
        ("another", 1),
    ],
)
def test_spoilt_greedy_states(name: str, value: Any, tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(GREEDY | {name: value}))
    with pytest.raises(OrthoRankError, match="not a saved search state; delete it to begin anew"):
        SearchState.load(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("candidates", None),
        ("scores", {"1": "x"}),
        ("scores", {"9": 1.0}),
        ("scores", [1.0]),
        ("scores", {"1": float("nan")}),
        ("batch_size", 0),
        ("another", 1),
    ],
)
def test_spoilt_scores(name: str, value: Any, tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(SCORES | {name: value}))
    with pytest.raises(OrthoRankError, match="not a saved one-shot search; delete it to begin anew"):
        ScoreState.load(file)


@pytest.mark.parametrize("words", ["", "[", "[" * 100_000, "[1]", "null", '"x"'])
def test_files_of_other_kinds(words: str, tmp_path: Path) -> None:
    file = write(tmp_path, words)
    for load in (SearchState.load, ScoreState.load):
        with pytest.raises(OrthoRankError, match="delete it to begin anew"):
            load(file)
