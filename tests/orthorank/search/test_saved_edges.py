"""Records that a run goes on from: of another format, of a newer version, with a key twice. Each is named."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orthorank import OrthoRankError
from orthorank.evaluation.kept import kept_rows
from orthorank.evaluation.longbench import local_questions
from orthorank.reproduce.cells import Cells
from orthorank.search.job import Folder
from orthorank.search.one_shot import ScoreState
from orthorank.search.state import SearchState


def opened(tmp_path: Path, content: Any) -> bool:
    (tmp_path / "search.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return Folder(tmp_path).open({"model": "a"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": 99, "search": {}}, "has format 99 and this version reads 1; go on with the version that wrote it"),
        ({"format": 99, "search": [1]}, "has format 99"),
        ({"format": 0, "search": {}}, "has format 0 and this version reads 1"),
        ({"format": 2**200, "search": {}}, "has format an integer of 201 bits"),
        ({"format": "1", "search": {}}, "is no record of a search"),
        ({"format": True, "search": {}}, "is no record of a search"),
        ({"format": 1, "search": [["a", 1]]}, "is no record of a search"),
        ({"format": 1}, "is no record of a search"),
        ([], "is no record of a search"),
        ('{"format": 1, "format": 99, "search": {}}', "is no record of a search"),
        ('{"format": 1, "search": {"model": "a", "model": "b"}}', "is no record of a search"),
        ("[" * 100_000, "is no record of a search"),
    ],
)
def test_the_record_of_a_search(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        opened(tmp_path, content)


def test_a_record_of_this_format_is_gone_on_from(tmp_path: Path) -> None:
    assert opened(tmp_path, {"format": 1, "search": {"model": "a"}, "results": None}) is False


SEARCH = {"candidates": [1, 2], "rounds": 1}


@pytest.mark.parametrize(
    ("load", "content", "words"),
    [
        (SearchState.load, SEARCH | {"schema": 99}, r"newer version of this package \(schema 99"),
        (SearchState.load, SEARCH | {"schema": 2**200}, r"newer version of this package \(schema an integer of"),
        (SearchState.load, SEARCH | {"schema": "1"}, "is not a saved search state"),
        (SearchState.load, SEARCH | {"schema": 0}, "is not a saved search state"),
        (SearchState.load, SEARCH | {"schema": None}, "is not a saved search state"),
        (SearchState.load, '{"candidates": [1], "candidates": [2], "rounds": 1}', "is not a saved search state"),
        (ScoreState.load, '{"candidates": [1], "scores": {"1": 2.0, "1": 3.0}}', "is not a saved one-shot search"),
        (Cells._read, '{"key": "a", "value": 1, "value": 2}', "is not a JSON file; delete it"),
        (partial(kept_rows, answer=str), '{"key": "a", "answer": "b", "answer": "c"}\n', "is no file of answers"),
        (partial(kept_rows, answer=str), '{"key": "a", "answer": 5}\n', "is no file of answers"),
        (
            local_questions,
            '{"task": "trec", "prompt": "a", "prompt": "b", "gold": ["c"]}',
            "line 1 of .* is no question",
        ),
        (local_questions, '{"task": "trec", "prompt": "a", "gold": ["c"], "idx": Infinity}', "is no question"),
    ],
)
def test_other_records(tmp_path: Path, load: Any, content: Any, words: str) -> None:
    file = tmp_path / "record.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(OrthoRankError, match=words):
        load(file)


def test_the_committed_cells_are_still_found() -> None:
    root = Path(__file__).parents[3] / "benchmarks" / "results"
    cells = sorted(root.glob("reproduce/*/cells/**/*.json"))
    if not cells:
        pytest.skip("the cells of the reproduction are in a checkout, not in the source archive")
    finished = [file for file in cells if not file.name.startswith("greedy-")]
    assert len(finished) > 20
    assert all(Cells._read(file) for file in finished)
    states = [SearchState.load(file) for file in cells if file.name.startswith("greedy-")]
    assert states
    assert all(state.complete for state in states)
