"""What cannot be applied, or not like that: the error says so, and the model stays as it was."""

from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from tests.orthorank.hf.test_apply import instance_state
from tests.orthorank.hf.test_layer import ids_of

PLAN = OrthoRankConfig(layers=[1, 2])


def test_removing_under_another_patch_is_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    handle = apply(model, PLAN)
    ours = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *a, **k: ours(*a, **k)
    with pytest.raises(OrthoRankError, match="replaced again after the plan"):
        handle.remove()
    model.model.layers[1].forward = ours
    handle.remove()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 32}, "num_hidden_layers 32 and this one has 4"),
        ({"hidden_size": 4096}, "hidden_size 4096 and this one has 64"),
        ({"model_type": "qwen2"}, "model_type 'qwen2' and this one has 'llama'"),
        ({"layers": [4]}, "layers holds 4; the model has layers 0 to 3"),
    ],
)
def test_a_plan_for_another_model(tiny_model: Any, fields: dict[str, Any], words: str) -> None:
    model = tiny_model("llama")
    before = instance_state(model)
    with pytest.raises(OrthoRankError, match=words):
        apply(model, OrthoRankConfig(**({"layers": [1]} | fields)))
    assert instance_state(model) == before


def test_a_plan_for_another_model_id(tiny_model: Any) -> None:
    model = tiny_model("llama")
    model.config._name_or_path = "someone/model-a"
    with pytest.raises(OrthoRankError, match=r"model_id 'someone/model-b' and this model is 'someone/model-a'"):
        apply(model, OrthoRankConfig(layers=[1], model_id="someone/model-b"))
    apply(model, OrthoRankConfig.for_model(model, layers=[1])).remove()


def test_an_unknown_family_lists_the_known_ones() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    with pytest.raises(OrthoRankError, match=r"GPT2LMHeadModel of type 'gpt2'.*llama.*mistral.*qwen2"):
        apply(model, PLAN)
    with pytest.raises(OrthoRankError, match="Linear of type None"):
        apply(torch.nn.Linear(2, 2), PLAN)


def test_a_layer_that_does_not_look_right(tiny_model: Any) -> None:
    model = tiny_model("llama")
    del model.model.layers[1].mlp
    with pytest.raises(OrthoRankError, match="LlamaDecoderLayer has no mlp"):
        apply(model, PLAN)


def test_what_is_no_plan(tiny_model: Any) -> None:
    with pytest.raises(OrthoRankError, match="config is a dict"):
        apply(tiny_model("llama"), {"layers": [1]})  # type: ignore[arg-type]


def test_a_layer_called_outside_its_model_is_an_error(tiny_model: Any) -> None:
    """As activation checkpointing around a layer does in backward: silently dense would be a wrong gradient."""
    model = tiny_model("llama")
    captured: dict[str, Any] = {}
    with apply(model, PLAN), torch.no_grad():
        hook = model.model.layers[1].register_forward_pre_hook(
            lambda m, args, kwargs: captured.update(args=args, kwargs=kwargs), with_kwargs=True
        )
        model(ids_of(1, 12), use_cache=False)
        hook.remove()
        with pytest.raises(OrthoRankError, match="layer 1 selects tokens and was called outside its model's forward"):
            model.model.layers[1](*captured["args"], **captured["kwargs"])


def test_a_plan_that_was_changed_is_checked_again(tiny_model: Any) -> None:
    plan = OrthoRankConfig(layers=[1])
    plan.criterion = "typo"
    with pytest.raises(OrthoRankError, match="criterion is 'typo'"):
        apply(tiny_model("llama"), plan)


def test_two_threads_are_refused_by_name(tiny_model: Any) -> None:
    import threading

    model = tiny_model("llama")
    errors: list[str] = []

    def other() -> None:
        try:
            model(ids_of(1, 8))
        except OrthoRankError as error:
            errors.append(str(error))

    with apply(model, PLAN) as handle:
        with handle.decoding():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert len(errors) == 1
        assert "in use by another thread" in errors[0]
        model(ids_of(1, 8))
