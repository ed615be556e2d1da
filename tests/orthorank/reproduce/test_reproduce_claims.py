"""The reproduction without a model: cells and what they are found by, verdicts, and the paper's own figures."""

import math
from pathlib import Path
from typing import Any

import pytest

from orthorank.common.errors import OrthoRankError
from orthorank.common.paired import paired
from orthorank.reproduce import paper, tables
from orthorank.reproduce.cells import Cells
from orthorank.reproduce.claims import judge, layer_by_layer, lower_loss


def test_cells_of_other_inputs_are_computed_again(tmp_path: Path) -> None:
    cells = Cells(tmp_path, {"model": "a"})
    assert cells.get("x", {"n": 1}, lambda: [1, (2,)]) == [1, [2]]
    assert cells.get("x", {"n": 2}, lambda: 5) == 5
    assert Cells(tmp_path, {"model": "b"}).get("x", {"n": 2}, lambda: 6) == 6
    for content, words in (
        ("{", r"x.json is not a JSON file; delete it"),
        ("[]", r"x.json is no finished cell; delete"),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(OrthoRankError, match=words):
            cells.get("x", {"n": 2}, lambda: 5)


def test_no_cell_takes_the_place_of_another(tmp_path: Path) -> None:
    """Two models in one folder, and two texts: each finds what it finished."""
    one, other = Cells(tmp_path, {"model": "a"}), Cells(tmp_path, {"model": "b"})
    assert [cells.get("x", {}, lambda n=n: n) for n, cells in enumerate((one, other))] == [0, 1]
    assert [cells.get("x", {}, lambda: 9) for cells in (one, other)] == [0, 1]
    assert [one.get("y", {}, lambda n=n: n, text=f"text {n}") for n in range(3)] == [0, 1, 2]
    assert [one.get("y", {}, lambda: 9, text=f"text {n}") for n in range(3)] == [0, 1, 2]
    assert one.get("x", {}, lambda: 9, text="any") == 0, "a file that names no text"


def test_cells_of_another_configuration(tmp_path: Path) -> None:
    """They go beside it; a file of an earlier version, which names none, fits all."""
    cells = [Cells(tmp_path, {"model": "a"}, config) for config in (None, "1", "2", "3")]
    assert [each.get("x", {}, lambda: 7) for each in cells] == [7, 7, 7, 7]
    for text in (None, "text"):
        for again in ("first", "again"):
            found = [each.get("y", {}, lambda n=n: n, text) for n, each in enumerate(cells[1:])]
            assert found == [0, 1, 2], (text, again)


@pytest.mark.parametrize(
    ("figure", "error", "verdict"),
    [
        (0.5, 0.2, "holds"),
        (0.3, 0.2, "undecided"),
        (-0.3, 0.2, "undecided"),
        (-0.5, 0.2, "fails"),
        (0.5, math.nan, "undecided"),
    ],
)
def test_verdicts(figure: float, error: float, verdict: str) -> None:
    assert judge(figure, 0.0, error) == verdict


def row(losses: list[float]) -> dict[str, Any]:
    return {"window_losses": losses, "perplexity": math.exp(sum(losses) / len(losses))}


def test_plans_are_compared_window_by_window() -> None:
    """A difference that is the same in every window counts, however much windows differ from each other."""
    claim = lower_loss("a is better", "Table 1", row([1.0, 9.0, 5.0]), row([1.1, 9.11, 5.09]), "text")
    assert claim.verdict == "holds"
    assert claim.n == 3
    assert claim.figure == pytest.approx(0.1)
    assert paired([1.0, 9.0], [1.1, 9.1]) == (pytest.approx(0.1), pytest.approx(0.0))
    assert lower_loss("a", "", row([1.0, 2.0]), row([3.0, 0.1]), "text").verdict == "undecided"


def test_a_single_bad_layer_fails_the_claim_but_not_the_last_one() -> None:
    def layer(number: int, margin: float) -> dict[str, Any]:
        return {
            "layer": number,
            "margin": margin,
            "standard_error": 0.01,
            "losses": [1.0, 1.0],
            "perplexities": [2.0, 3.0],
        }

    good = [layer(n, 0.5) for n in range(3)]
    assert layer_by_layer([*good, layer(3, -0.5)])[0].verdict == "holds", "the last layer is excepted"
    assert layer_by_layer([*good, layer(3, -0.5), layer(4, 0.5)])[0].verdict == "fails"
    assert layer_by_layer([*good, layer(3, -0.01), layer(4, 0.5)])[0].verdict == "undecided"


def test_the_paper_has_a_figure_for_each_of_its_rows() -> None:
    known = {name for name, *_ in tables.MAIN_ROWS} | {"dense"}
    assert set(paper.PERPLEXITY) <= known
    assert set(paper.PERPLEXITY) == set(paper.ACCURACY) == set(paper.THROUGHPUT)
    assert set(tables.ABLATIONS) == set(paper.ABLATION)
