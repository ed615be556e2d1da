"""The statement of the method stands apart: no line of the packages is in it. By hand, on five tokens."""

import ast
import math
from pathlib import Path

import torch

from tests.orthorank import statement
from tests.orthorank.statement import Row, chosen, count, groups


def test_it_imports_nothing_of_the_packages() -> None:
    source = Path(statement.__file__).read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    assert not {name.split(".")[0] for name in imported} & {"", "orthorank", "orthorank_kernels", "tests"}


def test_the_smallest_by_score_and_place() -> None:
    scores = [0.0, 2.0, 1.0, math.nan, 2.0]
    assert [chosen(scores, k) for k in range(6)] == [[], [2], [1, 2], [1, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert chosen(scores, 1, sink=None) == [0]
    assert chosen(scores, 2, forced=[3, 4]) == [3, 4]
    assert chosen(scores, 2, forced=[3], update_sink=True) == [0, 3]


def test_how_many() -> None:
    assert [count(10, ratio) for ratio in (0.0, 0.29, 0.3, 1.0)] == [0, 2, 3, 10]
    assert [count(3, 0.4, forced) for forced in (0, 1, 2, 9)] == [1, 1, 2, 2], "the sink is never forced"
    assert count(3, 0.4, 9, sink=False) == 3
    assert [count(3, 0.1, forced, update_sink=True) for forced in (0, 1, 9)] == [1, 2, 3]


def test_the_groups_of_a_step() -> None:
    """A prompt of 5 tokens from its second chunk on, in windows of 4, and a token behind it."""
    found = groups([Row(cached=3, tokens=3, prompt=5)], keep_last=1, window=4)
    assert [(g.positions, g.rows, g.forced, g.behind) for g in found] == [
        ([3], [0], set(), False),
        ([4], [1], {1}, False),
        ([5], [2], set(), True),
    ]
    assert [g.count(0.5) for g in found] == [0, 1, 1]


def test_a_cosine_with_a_sink_of_ones_own() -> None:
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    found = statement.ranks("cosine", x, x, sink=torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5**0.5], dtype=torch.float64))
