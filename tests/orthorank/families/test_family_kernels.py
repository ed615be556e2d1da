"""Every family's selected layer on the Triton kernels, in the interpreter, against the same layer on the references."""

from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, apply
from orthorank_kernels import dispatch
from tests.orthorank.families.test_families import padded
from tests.orthorank.models import MODELS, tiny
from tests.orthorank.statement import assert_close, call

pytest.importorskip("triton")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ops that ran as kernels; every one does."""
    ran: list[str] = []
    run = dispatch.run

    def on_triton(operator: Any, *args: Any, backend: str, **kwargs: Any) -> Any:
        ran.append(operator.launcher)
        return run(operator, *args, backend="triton", **kwargs)

    monkeypatch.setattr(dispatch, "run", on_triton)
    return ran


# Between them they use every option of the kernels that any family uses.
QUICK = ("gemma-2", "phi-3", "olmo-2", "stablelm-parallel", "cohere-norms", "granite", "qwen2-moe", "glm", "gpt-oss")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_kernels_give_what_the_references_give(name: str, request: pytest.FixtureRequest) -> None:
    model = tiny(name, num_hidden_layers=3 if "layer_types" not in MODELS[name].settings else 4)
    ids, mask = padded("left", (20, 13))
    with torch.no_grad(), apply(model, OrthoRankConfig(layers=[1], keep_ratio=0.4)):
        expected = call(model, ids, mask)[mask.bool()]
        ran = request.getfixturevalue("kernels")
        assert_close(call(model, ids, mask)[mask.bool()], expected)
    assert {"norm_selection.rms_norm_select", "attention.sparse_query_attention"} <= set(ran)
