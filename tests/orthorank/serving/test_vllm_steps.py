"""`orthorank.serving.vllm.backend.Shared.step`: what of vLLM's metadata is a step that selects, what is none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.packed.sinks import SinkBank
from orthorank.serving.vllm import hooks
from orthorank.serving.vllm.backend import Shared, StepMetadata, step_metadata
from orthorank.serving.vllm.counts import Counts
from orthorank.serving.vllm.requests import RequestTable
from orthorank.serving.vllm.serving import Serving

CPU = torch.device("cpu")


def shared(**fields: Any) -> Shared:
    """One request of 9 prompt tokens in row 0, none in row 1."""
    plan = OrthoRankConfig(layers=[1], keep_ratio=0.5, **fields)
    requests = RequestTable(2)
    requests.add(0, list(range(1, 10)))
    return Shared(Serving(plan), [1], SinkBank(lambda token: torch.zeros(1, 4), 8), requests)


def common(tokens: list[int], ends: list[int] | None, rows: list[int], **others: Any) -> SimpleNamespace:
    return SimpleNamespace(
        num_reqs=len(tokens),
        query_start_loc_cpu=torch.tensor([0, *tokens]).cumsum(0),
        seq_lens_cpu_upper_bound=None if ends is None else torch.tensor(ends),
        req_idx=torch.tensor(rows).numpy(),
        is_prefilling=None,
        **others,
    )


def test_a_prompt_selects_and_generated_tokens_do_not() -> None:
    assert shared().step(common([9], [9], [0]), CPU) is not None
    assert shared().step(common([1], [10], [0]), CPU) is None
    assert shared().step(common([0], [0], [0]), CPU) is None


def test_a_short_prompt_that_no_front_end_marked() -> None:
    assert shared(min_prompt=9).step(common([9], [9], [0]), CPU) is not None
    assert shared(min_prompt=10).step(common([9], [9], [0]), CPU) is None


def test_dense_prompts_beside_others() -> None:
    """All their tokens are updated, the first one too; a step of such alone is dense."""
    asked = SimpleNamespace(extra_args={"orthorank_dense": True})
    served, bank = shared(), list[Any]()
    served.bank = SinkBank(lambda tokens: bank.append(tokens) or torch.zeros(len(tokens), 1, 4), 8, batched=True)
    served.requests.add(1, [99, 5, 6], asked)
    served.counts = Counts(None)
    assert served.step(common([3], [3], [1]), CPU, counted=True) is None
    step = served.step(common([3, 9], [3, 9], [1, 0]), CPU, counted=True)
    assert step is not None
    assert (step.prompt_tokens, step.selected[0.5]) == (9, 3 + 4)
    assert step.sink_positions.tolist() == [-1, 0, -1]
    assert bank == [[1]]  # nobody compares with the first token of the other
    assert served.step(common([1], [4], [1]), CPU, counted=True) is None  # it generates
    assert [served.counts.get("orthorank_steps", kind) for kind in ("selected", "dense", "none")] == [1, 1, 1]


def test_a_plan_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    served = shared()
    worker = SimpleNamespace(model_runner=object(), get_model=lambda: SimpleNamespace(orthorank=served))
    for on in (False, True):
        assert hooks.switch(worker, on) == {"on": on, "said": ""}
        assert (served.step(common([9], [9], [0]), CPU) is not None) == on
    assert hooks.switch(worker, "false")["said"].startswith("on is 'false'; it must be true or false")
    served.removed = (3,)
    found = hooks.switch(worker, False)
    assert found["on"], found
    assert "the plan removes layers (3), whose weights are not here" in found["said"]
    for none in (SimpleNamespace(), SimpleNamespace(model_runner=1, get_model=SimpleNamespace)):
        assert hooks.switch(none, False) == {"on": False, "said": "the model of this worker has no plan"}


@pytest.mark.parametrize("prefilling", [None, [True], [True, False]])
def test_prompts_of_unknown_lengths_are_refused(prefilling: list[bool] | None) -> None:
    """They would be served dense, without a word."""
    unknown = common([9, 1], None, [0, 1])
    unknown.is_prefilling = None if prefilling is None else torch.tensor(prefilling)
    with pytest.raises(OrthoRankError, match=r"no seq_lens_cpu_upper_bound, so which .* would be served dense"):
        shared().step(unknown, CPU)


def test_steps_of_unknown_lengths_without_a_prompt_are_dense() -> None:
    """vLLM's warming up, where rows are of no request; requests that are known to generate."""
    assert shared().step(common([3], None, [1]), CPU) is None
    generating = common([1], None, [0])
    generating.is_prefilling = torch.tensor([False])
    assert shared().step(generating, CPU) is None


def test_metadata_of_another_builder_are_refused() -> None:
    step = StepMetadata(None, None, lambda: None)
    assert step_metadata(None) is None
    assert step_metadata(SimpleNamespace(orthorank=step)) is step
    with pytest.raises(OrthoRankError, match="SimpleNamespace of a selecting layer was built by another builder"):
        step_metadata(SimpleNamespace())


@pytest.mark.parametrize("found", [{}, {"layers.2": 2}, [{"layers.1": 1}]], ids=str)
def test_a_step_without_metadata_of_a_layer_is_refused(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """A list is what vLLM has where it splits a step in two."""
    monkeypatch.setattr(hooks, "context", lambda: SimpleNamespace(attn_metadata=found))
    with pytest.raises(OrthoRankError, match=rf"attn_metadata of type {type(found).__name__} without layers\.1"):
        hooks.metadata_of("layers.1")


def test_metadata_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, wanted in ((None, None), ({"layers.1": 1}, 1)):
        monkeypatch.setattr(hooks, "context", lambda found=found: SimpleNamespace(attn_metadata=found))
        assert hooks.metadata_of("layers.1") == wanted
