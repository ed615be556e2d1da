"""The committed simulation of attention's work order is what the launch settings give today, and nothing is worse."""

import json

import pytest

pytest.importorskip("triton")

from benchmarks.bench_work_order import MODELS, PROCESSORS, RESULTS, SHAPES, measured, time_of

KEPT = json.loads(RESULTS.read_text(encoding="utf-8"))


def test_all_is_there_and_nothing_is_worse():
    assert set(KEPT) == set(MODELS)
    for by_shape in KEPT.values():
        assert set(by_shape) == {f"{batch}x{tokens}" for batch, tokens in SHAPES}
        for by_count in by_shape.values():
            assert set(by_count) == set(map(str, PROCESSORS))
            assert all(x["before"] <= x["after"] <= 1 for x in by_count.values())


@pytest.mark.parametrize(("model", "batch", "tokens"), [("GQA 4", 1, 1024), ("MHA", 1, 2048), ("GQA 8", 8, 2048)])
def test_the_kept_figures_are_today_s(model, batch, tokens):
    assert measured(model, batch, tokens, 132) == KEPT[model][f"{batch}x{tokens}"]["132"]


def test_a_processor_takes_the_next_program_when_it_is_free():
    assert time_of([3, 1, 1, 1, 4], 2) == 7
    assert time_of([4, 3, 1, 1, 1], 2) == 5
