"""What a budget counts, FLOPs or measured seconds, and the picture of the front."""

import json
from pathlib import Path

import pytest
import torch

from contrib.budget.costs import CostTable, count_flops, measure_seconds
from contrib.budget.pareto import Point
from contrib.budget.pareto_plot import draw_front
from orthorank import OrthoRankError
from orthorank.stack.layers import LayerStack
from tests.orthorank.models import plain


def test_measured_seconds() -> None:
    """One entry for each layer; layers of one kind share a time, a removed layer takes none."""
    model = plain("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    stack, rounds = LayerStack(model), []
    table = measure_seconds(
        stack, torch.ones(1, 32, dtype=torch.long), [0.5], rounds=3, on_round=lambda done, total: rounds.append(done)
    )
    assert rounds == [1, 2, 3]
    assert (table.unit, table.tokens, table.num_layers) == ("time", 32, 4)
    assert set(table.by_ratio) == {1.0, 0.5, 0.0}
    assert table.by_ratio[0.0] == (0.0,) * 4
    for ratio in (1.0, 0.5):
        first = table.by_ratio[ratio]
        assert min(first) > 0
        assert first[0] == first[1]
        assert first[2] == first[3]
        assert first[0] != first[2], "a sliding layer is of another kind"
    assert CostTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    with pytest.raises(OrthoRankError, match="rounds is 0"):
        measure_seconds(stack, torch.ones(1, 32, dtype=torch.long), [0.5], rounds=0)
    with pytest.raises(OrthoRankError, match="input_ids has shape"):
        measure_seconds(stack, torch.ones(1, 1, dtype=torch.long), [0.5])
    with pytest.raises(OrthoRankError, match=r"ratios holds 1\.5"):
        measure_seconds(stack, torch.ones(1, 32, dtype=torch.long), [1.5])


def test_flops_of_layers() -> None:
    from transformers import LlamaConfig

    table = count_flops(LlamaConfig(num_key_value_heads=32), 2048, [1 / 3])
    assert table.layer(0, 0.0) == 0.0
    assert table.dense == 32 * table.layer(0, 1.0)
    nine = table.of(dict.fromkeys(range(20, 29), 1 / 3))
    assert table.dense / nine == pytest.approx(1.187, abs=1e-3), "the paper's nine layers"
    with pytest.raises(OrthoRankError, match="tokens is 0"):
        count_flops(LlamaConfig(), 0, [0.5])


def test_pictures_of_few_points(tmp_path: Path) -> None:
    """One point, equal points, losses far apart and infinite perplexities: a picture all the same."""
    for number, points in enumerate(
        (
            [Point(2.0, 3.0, {})],
            [Point(2.0, 3.0, {}), Point(2.0, 3.0, {1: 0.5}, "given")],
            [Point(2.0, 1.0, {}), Point(1.0, 9.0, {1: 0.0}, "given"), Point(1.5, 1e4, {2: 0.0})],
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = draw_front(points, 2.0, folder, title="a $title", budget=0.5, chosen=points[0])
        assert [file.name for file in files] == ["pareto.png", "pareto.svg"]
        again = draw_front(points, 2.0, tmp_path, title="a $title", budget=0.5, chosen=points[0])
        assert again[1].read_bytes() == files[1].read_bytes(), "the same data gives the same file"
