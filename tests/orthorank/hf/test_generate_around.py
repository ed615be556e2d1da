"""`generate()` around a plan: of a model whose inner part has it, of PEFT's prompt methods, and what a plan lacks."""

import contextlib
from typing import Any

import pytest
import torch

import orthorank
from orthorank import OrthoRankConfig, OrthoRankError, apply
from tests.orthorank.hf.test_layer import ids_of

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def test_a_plan_on_an_inner_part_decodes_plainly(family: str, tiny_model: Any) -> None:
    """The tokens of a plan on the whole model: the prompt is known by its call, its last token is updated."""
    model, ids = tiny_model(family), ids_of(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with apply(model, PLAN):
        whole = model.generate(ids, attention_mask=mask, **GREEDY)
        beams = model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY)
    with apply(model.model, PLAN) as handle:
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), whole)
        assert handle.stats[1].tokens_updated == 5 + 8 + 2 * 5
        assert torch.equal(model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY), beams)


@torch.no_grad()
@pytest.mark.parametrize(
    ("trick", "how"),
    [
        ({"prompt_lookup_num_tokens": 3}, "on .* tokens, some of which are drafts"),
        ({"use_cache": False}, "without a cache"),
        ({"prefill_chunk_size": 8}, "on 8 tokens over 8 cached ones"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_an_inner_part_under_other_tricks(tiny_model: Any, trick: dict[str, Any], how: str) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 8).repeat(1, 3)
    with apply(model.model, PLAN):
        plain = model.generate(ids, **GREEDY)
        with pytest.raises(OrthoRankError, match=f"generate.. of a LlamaForCausalLM calls a LlamaModel .*({how})"):
            model.generate(ids, **GREEDY, **trick)
        assert torch.equal(model.generate(ids, **GREEDY), plain)
        model(ids, use_cache=False)  # outside of generate() nothing is unclear
    with apply(model, PLAN):
        assert torch.equal(model.generate(ids, **GREEDY), plain)
        if "prefill_chunk_size" not in trick:
            assert torch.equal(model.generate(ids, **GREEDY, **trick), plain)


@torch.no_grad()
def test_a_scorer_inside_the_generation_of_another_model(tiny_model: Any) -> None:
    """It is called for its own prompts, as always, though a `generate()` is running that is not around it."""
    model, scorer, ids = tiny_model("llama"), tiny_model("llama", seed=1), ids_of(1, 24)
    seen: list[torch.Tensor] = []

    def score(given: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(scorer(ids, use_cache=False).logits)
        return logits

    with apply(scorer, PLAN):
        expected = scorer(ids, use_cache=False).logits
        model.generate(ids, logits_processor=[score], **GREEDY)
    assert len(seen) == 6
    assert all(torch.equal(logits, expected) for logits in seen)


@torch.no_grad()
def test_guidance_by_a_longer_prompt(tiny_model: Any) -> None:
    """Its calls come between those of `generate()`, of the same model, and move nothing."""
    model, ids, negative = tiny_model("llama"), ids_of(1, 12), ids_of(1, 30, seed=2)
    with apply(model, PLAN) as handle:
        updated = []
        for guided in ({}, {"guidance_scale": 1.5, "negative_prompt_ids": negative}):
            before = handle.stats[1].tokens_updated
            model.generate(ids, **GREEDY, **guided)
            updated.append(handle.stats[1].tokens_updated - before)
        assert updated[0] == 4 + 5
        assert updated[1] - updated[0] == 30 // 3 + 5, "guidance has a prompt of its own"


@torch.no_grad()
def test_an_assistant_that_is_an_inner_part(tiny_model: Any) -> None:
    """Its plan drafts; what it drafts over several tokens is refused, and the model it assists goes on without it."""
    model, assistant, ids = tiny_model("llama"), tiny_model("llama", seed=1), ids_of(1, 24)
    plain = model.generate(ids, **GREEDY)
    with apply(assistant, PLAN):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), plain)


def tuned(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    return peft.get_peft_model(model, settings).eval()


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompt_tuning_around_a_plan(tiny_model: Any, use_cache: bool) -> None:
    """Its six vectors are prompt, and the first of them the sink: as if they were given as embeddings."""
    model, ids = tiny_model("llama"), ids_of(1, 24)
    handle = apply(model, PLAN)
    wrapped = tuned(model)
    vectors = wrapped.get_prompt(batch_size=1)
    embeds = torch.cat([vectors, model.get_input_embeddings()(ids)], dim=1)
    expected = model.generate(inputs_embeds=embeds, use_cache=use_cache, **GREEDY)
    before = handle.stats[1].tokens_updated
    tokens = wrapped.generate(input_ids=ids, use_cache=use_cache, **GREEDY)
    assert torch.equal(tokens[:, 24:], expected)
    if use_cache:
        assert handle.stats[1].tokens_updated - before == 30 // 3 + 5
    handle.remove()
    assert orthorank.handle_of(model) is None


@torch.no_grad()
def test_prompt_tuning_inside_a_plan(tiny_model: Any) -> None:
    """Where PEFT was there first, its prompt comes behind the plan's back: refused, and the plan still comes off."""
    model, ids = tiny_model("llama"), ids_of(1, 24)
    wrapped = tuned(model)
    dense = wrapped.generate(input_ids=ids, **GREEDY)
    handle = apply(wrapped, PLAN)
    with pytest.raises(OrthoRankError, match="prepare_inputs_for_generation of the model was replaced around that of"):
        wrapped.generate(input_ids=ids, **GREEDY)
    handle.remove()
    assert torch.equal(wrapped.generate(input_ids=ids, **GREEDY), dense)


@torch.no_grad()
def test_prefix_tuning_is_refused(tiny_model: Any) -> None:
    """Its prefix is a cache that no plan has filled."""
    peft = pytest.importorskip("peft")
    model, ids = tiny_model("llama"), ids_of(1, 24)
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    wrapped = peft.get_peft_model(model, settings).eval()
    handle = apply(wrapped, PLAN)
    with pytest.raises(OrthoRankError, match=r"the cache was filled without a plan|was replaced around"):
        wrapped.generate(input_ids=ids, **GREEDY)
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("name", ["output_attentions", "output_router_logits"])
def test_a_plan_that_leaves_every_layer_dense_gives_every_output(tiny_model: Any, name: str) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 24)
    model.set_attn_implementation("eager")
    dense = model(ids, **{name: True})
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=1)):
        output = model(ids, **{name: True})
        assert torch.equal(output.logits, dense.logits)
        if name == "output_attentions":
            assert all(map(torch.equal, output.attentions, dense.attentions))
            generated = model.generate(ids, output_attentions=True, return_dict_in_generate=True, **GREEDY)
            assert len(generated.attentions) == 6
    for ratio in (0, 0.5):
        plan = OrthoRankConfig(layers=[1, 2], keep_ratios={2: 1}, keep_ratio=ratio)
        with apply(model, plan), pytest.raises(OrthoRankError, match=f"{name} is True"):
            model(ids, **{name: True})


@torch.no_grad()
def test_right_padding_before_tokens_that_are_ranked(tiny_model: Any) -> None:
    """With ``decode="threshold"`` they would stand behind padding; padded on the left they do not."""
    model, ids = tiny_model("llama"), ids_of(2, 12)
    tau = dict.fromkeys([1, 2], 20.0)
    plan = OrthoRankConfig(layers=[1, 2], select="threshold", thresholds=tau, decode="threshold")
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 8:] = 0
    left[1, :4] = 0
    with apply(model, plan) as handle:
        with pytest.raises(OrthoRankError, match=r"row 1 of the prompt has padding on the right.*pad on the left"):
            model.generate(ids, attention_mask=right, **GREEDY)
        assert handle.stats[1].calls == 0, "said before anything ran"
        model(ids, attention_mask=right)  # a prompt alone may be padded anywhere
        shifted = torch.cat([ids[1:, 8:], ids[1:, :8]], dim=1)
        both = model.generate(torch.cat([ids[:1], shifted]), attention_mask=left, **GREEDY)
        alone = model.generate(ids[1:, :8], **GREEDY)
        assert torch.equal(both[1, 12:], alone[0, 8:])
    with apply(model, PLAN):
        assert model.generate(ids, attention_mask=right, **GREEDY).shape == (2, 18)


class Branch:
    """What transformers' guidance gets from the model, step by step: the ids it goes by and its last logits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

        self.logits: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []
        original = Guidance.get_unconditional_logits

        def get(processor: Any, input_ids: torch.Tensor) -> Any:
            output = original(processor, input_ids)
            self.logits.append(getattr(output, "logits", output)[:, -1])  # an output in some versions
            self.tokens.append(input_ids[:, -1:].clone())
            return output

        monkeypatch.setattr(Guidance, "get_unconditional_logits", get)


NEGATIVE: dict[str, dict[str, Any]] = {
    "short": {"negative_prompt_ids": ids_of(2, 8, seed=2)},
    "long": {"negative_prompt_ids": ids_of(2, 40, seed=2)},
    "of one token": {},
    "padded": {
        "negative_prompt_ids": ids_of(2, 14, seed=2),
        "negative_prompt_attention_mask": torch.tensor([[0] * 5 + [1] * 9, [1] * 14]),
    },
}


@torch.no_grad()
@pytest.mark.parametrize("inner", [False, True], ids=["the whole model", "its inner part"])
@pytest.mark.parametrize("negative", list(NEGATIVE))
def test_guidance_generates_from_a_prompt_of_its_own(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, negative: str, inner: bool
) -> None:
    """Its branch is what a prefill of the negative prompt and plain steps over its cache give."""
    from transformers import DynamicCache

    model, ids = tiny_model("llama"), ids_of(2, 24)
    given = NEGATIVE[negative]
    branch = Branch(monkeypatch)
    with apply(model.model if inner else model, PLAN) as handle:
        guided = model.generate(ids, guidance_scale=2.0, **GREEDY, **given)
        counted = handle.stats[1].tokens_updated
        prompt = given.get("negative_prompt_ids", ids[:, -1:])
        mask = given.get("negative_prompt_attention_mask", torch.ones_like(prompt))
        cache, step = DynamicCache(config=model.config), prompt
        for i, logits in enumerate(branch.logits):
            options: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
            with handle.prefilling() if i == 0 else contextlib.nullcontext():
                expected = model(step, **options).logits[:, -1]
            assert (logits - expected).abs().max() < 1e-4, f"step {i} of the branch"
            step = branch.tokens[i + 1] if i + 1 < len(branch.tokens) else step
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        alone = handle.stats[1].tokens_updated - counted
        assert counted - alone == 2 * (8 + 5), "generate() itself is moved by nothing"
        assert not torch.equal(guided, model.generate(ids, **GREEDY)), "guidance changes nothing, nor would a mistake"


@torch.no_grad()
def test_guidance_without_a_cache_is_refused(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 24)
    with apply(model, PLAN), pytest.raises(OrthoRankError, match="without a cache"):
        model.generate(ids, guidance_scale=2.0, use_cache=False, **GREEDY)


@torch.no_grad()
@pytest.mark.parametrize("inner", [False, True], ids=["the whole model", "its inner part"])
@pytest.mark.parametrize(
    ("place", "compiled"),
    [("processor", False), ("criterion", False), pytest.param("processor", True, marks=pytest.mark.slow)],
)
def test_a_scorer_that_is_the_model_itself(tiny_model: Any, place: str, compiled: bool, inner: bool) -> None:
    """Between two steps of its own `generate()` the model is called for another prompt: read as outside of it."""
    model, ids, other = tiny_model("llama", num_hidden_layers=3), ids_of(1, 24), ids_of(1, 30, seed=3)
    seen: list[torch.Tensor] = []

    def score(given: torch.Tensor, logits: torch.Tensor, **kwargs: Any) -> Any:
        seen.extend(eager(x, use_cache=False).logits for x in (other, other[:, :9]))
        return logits if place == "processor" else torch.zeros(1, dtype=torch.bool)

    eager = model.__call__
    with apply(model.model if inner else model, PLAN):
        expected = [model(x, use_cache=False).logits for x in (other, other[:, :9])]
        plain = model.generate(ids, **GREEDY)
        if compiled:
            torch._dynamo.reset()
            model.forward = torch.compile(model.forward, backend="eager", dynamic=True)

            def eager(*args: Any, **kwargs: Any) -> Any:
                return type(model).forward(model, *args, **kwargs)

        asked: Any = {"logits_processor": [score]} if place == "processor" else {"stopping_criteria": [score]}
        assert torch.equal(model.generate(ids, **asked, **GREEDY), plain)
    assert len(seen) == 12
    for i, logits in enumerate(seen):
        assert torch.equal(logits, expected[i % 2])
