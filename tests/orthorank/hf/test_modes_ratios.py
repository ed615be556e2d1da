"""A plan whose layers have ratios of their own: some select, one is removed, one is dense."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply, status
from orthorank.evaluation import prefill_flops
from tests.orthorank import statement
from tests.orthorank.models import without_layers

RATIOS = {0: 0.25, 1: 0.0, 2: 0.75, 3: 1.0}
TOKENS = 20


def mixed() -> OrthoRankConfig:
    return OrthoRankConfig(layers=[0, 1, 2, 3], keep_ratio=0.25, keep_ratios={1: 0, 2: 0.75, 3: 1})


def stated(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one row under the mixed plan, each layer's rule as a hook on the dense one."""
    counts = {layer: int(ratio * ids.shape[1] + 1e-6) for layer, ratio in RATIOS.items() if ratio < 1}
    return statement.logits_by_rule(model, ids, {i: partial(statement.selected_mask, k=k) for i, k in counts.items()})


def test_mixed_layers_follow_their_own_ratios(tiny_model: Any, family: str) -> None:
    model, ids = tiny_model(family), torch.randint(3, 128, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    expected = stated(model, ids)
    with torch.no_grad(), apply(model, mixed()):
        statement.assert_close(model(ids, use_cache=False).logits, expected)
        statement.assert_close(model(ids).logits, expected)


def test_a_padded_row_of_a_mixed_plan_is_the_row_alone(tiny_model: Any) -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad(), apply(model, mixed()) as handle:
        both = model(ids, attention_mask=mask).logits
        rows = [(layer, counts.tokens_in, counts.tokens_updated) for layer, counts in handle.stats.items()]
        statement.assert_close(both[1:, 7:], model(ids[1:, 7:]).logits)
    assert rows == [(0, 33, 5 + 3), (1, 33, 0), (2, 33, 15 + 9), (3, 33, 33)]


def test_each_row_updates_a_multiple_as_far_as_it_has_tokens(tiny_model: Any) -> None:
    """Of 20, 13 and 5 tokens a quarter is 5, 3 and 1; in eights 8, 8 and 4, since the sink is never updated."""
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (3, TOKENS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :15] = 0
    plan = OrthoRankConfig(layers=[1], keep_ratio=0.25, keep_multiple=8)
    with torch.no_grad(), apply(model, plan) as handle:
        together = model(ids, attention_mask=mask).logits
        assert handle.stats[1].tokens_updated == 8 + 8 + 4
        for row, padding in enumerate((0, 7, 15)):
            statement.assert_close(together[row : row + 1, padding:], model(ids[row : row + 1, padding:]).logits)
        assert handle.stats[1].tokens_updated == 2 * (8 + 8 + 4)
    expected = statement.logits_by_rule(model, ids[:1], {1: partial(statement.selected_mask, k=8)})
    statement.assert_close(together[:1], expected)


def test_decoding_passes_all_but_the_removed_layer(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), torch.arange(3, 3 + TOKENS)[None]
    pruned = without_layers(model, [1])
    with torch.no_grad(), apply(model, mixed()) as handle:
        with handle.decoding():
            statement.assert_close(model(ids).logits, pruned(ids).logits)
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert [counts.calls for counts in handle.stats.values()] == [5] * 4
        assert handle.stats[0].tokens_updated == TOKENS + 5 + 3
    assert generated.shape == (1, TOKENS + 4)


def test_status_names_each_layer(tiny_model: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    with apply(model, mixed()):
        rows = status(model).rows
    assert [(row.layer, row.mode, row.keep_ratio) for row in rows] == [
        (0, "selected", 0.25),
        (1, "removed", 0.0),
        (2, "selected", 0.75),
        (3, "dense", 1.0),
        (4, "dense", 1.0),
    ]


def test_plan_file_and_sparsity(tmp_path: Path) -> None:
    plan = mixed()
    assert plan.selecting == [0, 2]
    assert plan.ratios == RATIOS
    assert plan.ratio(9) == 1.0, "a layer that the plan does not name"
    assert plan.nominal_sparsity(4) == (0.75 + 1 + 0.25) / 4
    again = OrthoRankConfig.from_pretrained(plan.save_pretrained(tmp_path))
    assert again == plan
    assert again.keep_ratios == {1: 0.0, 2: 0.75, 3: 1.0}


def test_flops_are_the_sum_over_layers(tiny_model: Any) -> None:
    config = tiny_model("llama").config
    dense = prefill_flops(config, 64)
    saved = {i: dense - prefill_flops(config, 64, [i], ratio) for i, ratio in RATIOS.items()}
    assert prefill_flops(config, 64, range(4), RATIOS) == pytest.approx(dense - sum(saved.values()), rel=1e-12)
    with pytest.raises(OrthoRankError, match="keep_ratio has no key 3"):
        prefill_flops(config, 64, [3], {2: 0.5})
    with pytest.raises(OrthoRankError, match=r"keep_ratio is 1\.5; it must be from 0"):
        prefill_flops(config, 64, [3], {3: 1.5})
