"""The modes inside compiled graphs and on the Triton kernels: the same results, one compilation, nothing that waits."""

from typing import Any

import pytest
import torch

import orthorank
from orthorank import OrthoRankConfig, apply
from orthorank.hf import selection as choosing
from tests.orthorank.families.test_family_kernels import kernels
from tests.orthorank.hf.test_compat_compile import Graphs, fresh_compiler, left_padded
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.statement import assert_close

__all__ = ["fresh_compiler", "kernels"]  # fixtures

PLANS: dict[str, dict[str, Any]] = {
    "window": {"select": "window", "select_window": 7},
    "threshold": {"select": "threshold", "thresholds": {1: 20.0}},
    "threshold, decode too": {"select": "threshold", "thresholds": {1: 20.0}, "decode": "threshold"},
    "context": {},
    "window, any length": {"select": "window", "select_window": 7},
    "threshold, corrected": {"select": "threshold", "thresholds": {1: 20.0}, "correction": maps([1])},
}


def plan(name: str) -> OrthoRankConfig:
    return OrthoRankConfig(layers=[1], **({"keep_ratio": 0.4} | PLANS[name]))


def run(model: Any, name: str, forward: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if name != "context":
        return forward(ids, attention_mask=mask).logits[mask == 1]
    with orthorank.context(model, [5, 9]):
        return forward(ids, attention_mask=mask).logits[mask == 1]


QUICK = ("window", "threshold", "threshold, corrected")  # and with the length of a call unknown: the slow ones


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLANS]
)
def test_many_calls_compile_once(tiny_model: Any, name: str) -> None:
    model, graphs = tiny_model("llama", num_hidden_layers=2), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with apply(model, plan(name)) as handle:
        for pad in range(0, 12, 2):
            ids, mask = ids_of(2, 24, seed=pad), torch.ones(2, 24, dtype=torch.long)
            mask[0, :pad] = 0
            before = handle.stats[1].tokens_updated
            expected = run(model, name, model, ids, mask)
            once = handle.stats[1].tokens_updated - before
            assert_close(run(model, name, compiled, ids, mask), expected)
            assert handle.stats[1].tokens_updated == before + 2 * once
            assert 0 < once < 48 - pad
        assert len(graphs.graphs) == 1
        assert not graphs.called() & {"item", "tolist", "_local_scalar_dense", "cpu", "nonzero"}, "a call waits"
        if name in QUICK:  # a graph for any length takes long to compile
            return
        for tokens in (17, 31):
            ids, mask = ids_of(2, tokens), left_padded(2, tokens)
            assert_close(run(model, name, compiled, ids, mask), run(model, name, model, ids, mask))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in PLANS if name != "window, any length"])
def test_the_kernels_stop_where_nothing_is_selected(
    tiny_model: Any, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Triton, with the room left as it was asked for: -1 from each row's count on."""
    model = tiny_model("llama", num_hidden_layers=2)
    ids, mask = ids_of(2, 19, seed=3), left_padded(2, 19)
    with apply(model, plan(name)):
        expected = run(model, name, model, ids, mask)
        monkeypatch.setattr(choosing, "fitted", lambda plan, call, positions, counts: positions)
        assert_close(run(model, name, model, ids, mask), expected)
        ran = request.getfixturevalue("kernels")
        assert_close(run(model, name, model, ids, mask), expected)
    assert {"attention.sparse_query_attention", "rows.gather_rows"} <= set(ran)
