"""The criteria and ablations on every family: their norms, windows, caps and rotary embeddings are the layer's own."""

from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, apply
from tests.orthorank import statement
from tests.orthorank.hf.test_criteria import count
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import MODELS, tiny
from tests.orthorank.statement import assert_close

ROWS: dict[str, dict[str, Any]] = {
    "keys of the selected": {"kv": "selected"},
    "pre-norm": {"criterion": "prenorm"},
    "cosine, sinks, sink updated": {"criterion": "cosine", "sinks": "auto", "update_sink": True},
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_matches_the_naive_statement(name: str, row: str) -> None:
    model, ids, options = tiny(name, attention="eager"), ids_of(1, 33), ROWS[row]
    expected = statement.logits(model, ids, [0, 1, 2], k=count(33, 0.4, options), **options)
    with apply(model, OrthoRankConfig(layers=[0, 1, 2], keep_ratio=0.4, **options)), torch.no_grad():
        assert_close(model(ids, use_cache=False).logits, expected)
