"""Similarities and layer-wise comparison against plain computations on hidden states, and the figures."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.functional import cosine_similarity

import orthorank
from orthorank.analysis import LayerComparison, compare_layers, figures, measure_similarities
from orthorank.cli import main
from orthorank.common.errors import OrthoRankError
from orthorank.stack.layers import LayerStack


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return tiny_model("llama")


def passages(count: int = 3, tokens: int = 20) -> torch.Tensor:
    return torch.randint(3, 120, (count, tokens), generator=torch.Generator().manual_seed(1))


def test_similarities_are_cosines_of_normalised_states(model: Any) -> None:
    ids = passages()
    found = measure_similarities(LayerStack(model), ids, other=4)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        normed = [layer.input_layernorm(h) for layer, h in zip(model.model.layers, states, strict=False)]
    for layer in range(4):
        x = normed[layer]
        for i in range(10):
            wanted = cosine_similarity(x[:, 0], x[:, 1 + i], dim=-1).mean().item()
            assert found.sink_with[layer][i] == pytest.approx(wanted, abs=1e-5)
            wanted = cosine_similarity(x[:, 4], x[:, 5 + i], dim=-1).mean().item()
            assert found.other_with[layer][i] == pytest.approx(wanted, abs=1e-5)
        each = torch.stack([cosine_similarity(x[:, 0], x[:, i], dim=-1) for i in range(1, 11)]).mean(0)
        assert found.sink_with_error[layer] == pytest.approx((each.std() / math.sqrt(3)).item(), abs=1e-5)
        for other in range(4):
            wanted = cosine_similarity(x[:, 0], normed[other][:, 0], dim=-1).mean().item()
            assert found.sink_across[layer][other] == pytest.approx(wanted, abs=1e-5)
            wanted = cosine_similarity(x[:, 4], normed[other][:, 4], dim=-1).mean().item()
            assert found.other_across[layer][other] == pytest.approx(wanted, abs=1e-5)


def test_layers_are_compared_window_by_window(model: Any) -> None:
    ids = passages(2, 24)
    found = compare_layers(LayerStack(model), ids, [1, 3], keep_ratio=0.25)
    assert [one.layer for one in found] == [1, 3]
    for one in found:
        for criterion, losses in (("orthogonal", one.losses), ("inverse", one.other_losses)):
            plan = orthorank.OrthoRankConfig(layers=[one.layer], keep_ratio=0.25, criterion=criterion)
            with orthorank.apply(model, plan), torch.no_grad():
                for row, loss in zip(ids, losses, strict=True):
                    assert loss == pytest.approx(model(row[None], labels=row[None]).loss.item(), abs=1e-5)


def test_figures_of_a_comparison() -> None:
    one = LayerComparison(3, (1.0, 2.0), (1.5, 2.1))
    assert one.perplexities == (pytest.approx(math.exp(1.5)), pytest.approx(math.exp(1.8)))
    assert one.difference == pytest.approx(math.exp(1.5) - math.exp(1.8))
    assert one.margin == pytest.approx(0.3)
    assert one.standard_error == pytest.approx(0.2)
    assert math.isnan(LayerComparison(3, (1.0,), (1.5,)).standard_error)


@pytest.mark.parametrize(
    ("shape", "other", "words"),
    [((2, 10), 5, "at least 11 are needed"), ((2, 6), 5, "at least 7 tokens"), ((2, 20), 0, "other is 0")],
)
def test_passages_that_are_too_short(model: Any, shape: tuple[int, int], other: int, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        measure_similarities(LayerStack(model), torch.zeros(shape, dtype=torch.long), other=other)


def test_a_figure_is_a_png_and_an_svg_and_always_the_same(tmp_path: Path) -> None:
    paths = figures.draw_chosen_layers({"a plan": {1: 0.5, 2: 0.0}}, 4, tmp_path)
    assert {path.suffix for path in paths} == {".png", ".svg"}
    assert (tmp_path / "fig5-chosen-layers.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(tmp_path / "fig5-chosen-layers.svg")
    again = [path.read_bytes() for path in paths]
    figures.draw_chosen_layers({"a plan": {1: 0.5, 2: 0.0}}, 4, tmp_path)
    assert [path.read_bytes() for path in paths] == again, "the same figure is the same file"


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = orthorank.OrthoRankConfig(layers=[2, 3], keep_ratio=0.5).save_pretrained(tmp_path / "plan")
    sizes = ["--passages", "4", "--passage-tokens", "16", "--windows", "2", "--window", "32", "--device", "cpu"]
    out = tmp_path / "out"
    assert main(["analyze", str(tiny_folder), *sizes, "--plan", str(plan), "--output", str(out)]) == 0
    assert "better than the others in" in " ".join(capsys.readouterr().out.split())
    names = {path.stem for path in out.glob("*.png")}
    assert {name[:4] for name in names} == {"fig2", "fig3", "fig4", "fig5", "fig7"}
    assert {path.stem for path in out.glob("*.svg")} == names
    assert not list(out.glob(".*"))
    written = json.loads((out / "analysis.json").read_text())
    assert len(written["similarities"]["sink_with"]) == 6
    assert [one["layer"] for one in written["layerwise"]] == [1, 2, 3, 4, 5]
    assert written["plans"]["orthorank"]["layers"] == [2, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep-ratio", "1"], "keep_ratio is '1'"),
        (["--passages", "0"], "passages is 0"),
        (["--passages", "100000"], "name a longer text, or lower --passages"),
        (["--plan", "nowhere"], "no plan can be read"),
    ],
)
def test_the_command_says_what_is_wrong(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["analyze", str(tiny_folder), "--device", "cpu", "--output", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
