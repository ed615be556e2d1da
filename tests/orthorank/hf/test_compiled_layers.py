"""Layers that are compiled one by one, windows of any length in a graph, and exported programs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.correction import Correction
from tests.orthorank.hf.test_compat_compile import Graphs, fresh_compiler
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.statement import assert_close

__all__ = ["fresh_compiler"]  # a fixture

ROOT = Path(__file__).parents[3]
LAYERS = list(range(1, 11))
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"criterion": "cosine"}, {"correction": maps(LAYERS, hidden=32)}], ids=str)
def test_ten_selected_layers_share_a_graph(tiny_model: Any, fields: dict[str, Any]) -> None:
    """As ten dense ones do: nothing in it depends on which layer it is."""
    model, graphs, ids = tiny_model("llama", num_hidden_layers=12, **SMALL), Graphs(), ids_of(1, 24)
    with apply(model, OrthoRankConfig(layers=LAYERS, **fields)) as handle:
        expected = model(ids, use_cache=False).logits
        for layer in LAYERS:
            model.model.layers[layer].compile(backend=graphs, fullgraph=True)
        for _ in range(2):
            assert_close(model(ids, use_cache=False).logits, expected)
        assert len(graphs.graphs) == 1
        assert {layer: counts.calls for layer, counts in handle.stats.items()} == dict.fromkeys(LAYERS, 3)
        assert {counts.tokens_updated for counts in handle.stats.values()} == {3 * 8}


@torch.no_grad()
@pytest.mark.parametrize("corrected", [None, maps([1, 2, 3, 4], hidden=32)], ids=["plain", "corrected"])
def test_regions_that_accelerate_compiles(tiny_model: Any, corrected: Correction | None) -> None:
    """Before the plan, which goes to what comes out; after it, the copy would follow the plan and not be compiled."""
    utils = pytest.importorskip("accelerate.utils")
    model, graphs, ids = tiny_model("llama", num_hidden_layers=6, **SMALL), Graphs(), ids_of(1, 24)
    plan = OrthoRankConfig(layers=[1, 2, 3, 4], correction=corrected)
    with apply(model, plan):
        expected = model(ids, use_cache=False).logits
        copied = utils.compile_regions(model, backend=graphs)
        with pytest.raises(OrthoRankError, match=r"shallow copy .*compile_regions.* apply the plan to what you get"):
            copied(ids, use_cache=False)
        with pytest.raises(OrthoRankError, match="shallow copy"):
            copied.generate(ids, max_new_tokens=2)
    dense = model(ids, use_cache=False).logits
    graphs.graphs.clear()
    compiled = utils.compile_regions(model, backend=graphs)
    handle = apply(compiled, plan)
    assert_close(compiled(ids, use_cache=False).logits, expected)
    assert handle.stats[4].calls == 1
    layers = [graph for graph in graphs.graphs if any("rms_norm_select" in str(n.target) for n in graph.graph.nodes)]
    assert len(layers) == 1, "one for the four selected layers"
    handle.remove()
    assert_close(compiled(ids, use_cache=False).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("corrected", [None, maps([1], hidden=32)], ids=["plain", "corrected"])
def test_windows_of_any_length_are_one_graph(tiny_model: Any, corrected: Correction | None) -> None:
    """Without padding, too: the number of windows is nothing that a graph is made for."""
    model, graphs = tiny_model("llama", num_hidden_layers=2, **SMALL), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    window: dict[str, Any] = {"keep_ratio": 0.4, "select": "window", "select_window": 8, "correction": corrected}
    with apply(model, OrthoRankConfig(layers=[1], **window)) as handle:
        for tokens in (9, 16, 31, 100):
            ids = ids_of(1, tokens)
            expected = model(ids, use_cache=False).logits
            updated = handle.stats[1].tokens_updated
            assert_close(compiled(ids, use_cache=False).logits, expected)
            assert handle.stats[1].tokens_updated - updated == tokens // 8 * 3 + int(0.4 * (tokens % 8))
    assert len(graphs.graphs) == 1


EXPORTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "corrected": {"correction": maps([1], hidden=32)},
    "window": {"select": "window", "select_window": 8},
}


class Logits(torch.nn.Module):
    """What is exported."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> Any:
        return self.model(ids, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("way", [pytest.param("plain", marks=pytest.mark.slow), "corrected", "window"])
def test_an_exported_program(tiny_model: Any, way: str) -> None:
    """Of any length, and without counting, so that it decomposes."""
    model = tiny_model("llama", num_hidden_layers=2, **SMALL)
    length = {"ids": {1: torch.export.Dim.AUTO}}
    with apply(model, OrthoRankConfig(layers=[1], **EXPORTED[way])) as handle:
        program = torch.export.export(Logits(model), (ids_of(1, 24),), dynamic_shapes=length).run_decompositions()
        assert handle.stats[1].calls == 0
        assert not program.graph_signature.buffers_to_mutate
        for tokens in (24, 17, 40):
            ids = ids_of(1, tokens)
            assert_close(program.module()(ids), model(ids, use_cache=False).logits)


FRESH = """
import sys
import orthorank_kernels, torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(ids) for ids in torch.load(sys.argv[2])], sys.argv[3])
assert not {"orthorank", "transformers"} & set(sys.modules)
"""


@torch.no_grad()
def test_an_exported_program_in_a_fresh_process(tiny_model: Any, tmp_path: Path) -> None:
    """Saved, and run where neither the model's code nor the method is: the operators alone are."""
    model, asked = tiny_model("llama", num_hidden_layers=2, **SMALL), [ids_of(1, n) for n in (24, 7, 300)]
    program, ids, found = (str(tmp_path / name) for name in ("program.pt2", "ids.pt", "found.pt"))
    with apply(model, OrthoRankConfig(layers=[1])):
        length = {"ids": {1: torch.export.Dim.AUTO}}
        torch.export.save(torch.export.export(Logits(model), (asked[0],), dynamic_shapes=length), program)
        expected = [model(each, use_cache=False).logits for each in asked]
    torch.save(asked, ids)
    subprocess.run([sys.executable, "-c", FRESH, program, ids, found], check=True, cwd=ROOT)
    for got, wanted in zip(torch.load(found), expected, strict=True):
        assert_close(got, wanted)
