"""What must hold exactly: ratio 1 is the dense model, ratio 0 removes the layer, padding and prompts change nothing."""

from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, apply
from orthorank.correction import Correction
from orthorank.stack.layers import LayerStack
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import WINDOWS, ids_of
from tests.orthorank.models import without_layers
from tests.orthorank.statement import assert_close


def test_ratio_one_is_dense(tiny_model: Any, family: str) -> None:
    model = tiny_model(family)
    ids = ids_of(2, 24)
    with torch.no_grad():
        dense = model(ids).logits
        with apply(model, OrthoRankConfig(layers=[0, 1, 2, 3], keep_ratio=1)):
            assert torch.equal(model(ids).logits, dense)


def test_selecting_everything_is_dense(tiny_model: Any, family: str) -> None:
    """The selection path itself, with every token selected: floor((1 - 1e-9) n + 1e-6) is n."""
    model = tiny_model(family)
    ids = ids_of(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        dense = model(ids, attention_mask=mask).logits[mask.bool()]
        with apply(model, OrthoRankConfig(layers=[0, 1, 2, 3], keep_ratio=1 - 1e-9)) as handle:
            assert_close(model(ids, attention_mask=mask).logits[mask.bool()], dense)
        assert handle.stats[0].tokens_updated == mask.sum()


@pytest.mark.parametrize("layers", [[1, 2], [0], [0, 3], [2, 3]])
@pytest.mark.parametrize("windowed", [False, True])
def test_ratio_zero_removes_the_layer(tiny_model: Any, family: str, layers: list[int], windowed: bool) -> None:
    """Also where the removed layer is the one that masks and positions are read from (the first of each kind)."""
    model = tiny_model(family, **(WINDOWS[family] if windowed else {}))
    pruned = without_layers(model, layers)
    ids = ids_of(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        expected = pruned(ids, attention_mask=mask).logits[mask.bool()]
        tokens = pruned.generate(ids, attention_mask=mask, **settings)
        with apply(model, OrthoRankConfig(layers=layers, keep_ratio=0)) as handle:
            assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected)
            assert torch.equal(model.generate(ids, attention_mask=mask, **settings), tokens)
            static = model.generate(ids, attention_mask=mask, cache_implementation="static", **settings)
            assert torch.equal(static, tokens)
            assert handle.stats[layers[0]].tokens_updated == 0
            lookup = model.generate(ids[1:], prompt_lookup_num_tokens=3, **settings)
            assert torch.equal(lookup, pruned.generate(ids[1:], **settings))


def test_ratio_zero_computes_nothing(tiny_model: Any) -> None:
    model = tiny_model("llama")
    called = []
    for name, module in model.model.layers[1].named_modules():
        if name:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=0)), torch.no_grad():
        model.generate(ids_of(1, 6), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert called == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("keep_last", [0, 2])
@pytest.mark.parametrize("corrected", [None, maps([1, 2, 3])], ids=["plain", "corrected"])
def test_a_row_alone_equals_the_row_in_a_batch(
    tiny_model: Any, family: str, side: str, windowed: bool, keep_last: int, corrected: Correction | None
) -> None:
    model = tiny_model(family, **(WINDOWS[family] if windowed else {}))
    lengths = (21, 1, 2, 13, 30)
    rows = [ids_of(1, n, seed=n) for n in lengths]
    longest = max(lengths)
    batch, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    spans = [slice(longest - n, longest) if side == "left" else slice(0, n) for n in lengths]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span], mask[i, span] = row[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    handle = apply(model, OrthoRankConfig(layers=[1, 2, 3], keep_ratio=0.4, correction=corrected))
    with handle.prefilling(keep_last=keep_last), torch.no_grad():
        together = model(batch, attention_mask=mask, position_ids=positions).logits
        for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
            assert_close(together[i : i + 1, span], model(row).logits)
    handle.remove()


def test_the_sink_state_depends_on_the_first_token_alone(smollm2: Any) -> None:
    """Method, section 2: another prompt, another length, padding: the normalised state of token 0 stays (1e-5)."""
    model, _ = smollm2
    stack = LayerStack(model)

    def states(ids: torch.Tensor) -> list[torch.Tensor]:
        inputs = stack.embed(ids)
        h, seen = inputs.hidden_states, []
        for layer in range(stack.num_layers):
            seen.append(stack.normed(layer, h)[0, 0])
            h = stack.run(layer, h, inputs)
        return seen

    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 40000, (1, n), generator=generator) for n in (5, 40, 40)]
    for prompt in prompts:
        prompt[0, 0] = 504
    first, *others = [states(prompt) for prompt in prompts]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert (a - b).norm() < 1e-5 * a.norm()
    different = states(torch.cat([torch.tensor([[1000]]), prompts[0][:, 1:]], dim=1))
    assert (different[0] - first[0]).norm() > 1e-2 * first[0].norm()
    assert (different[20] - first[20]).norm() < 0.05 * first[20].norm(), "past l_sink the sinks of all tokens are alike"


def test_identities_on_smollm2(smollm2: Any) -> None:
    model, tokenizer = smollm2
    text = "The quick brown fox jumps over the lazy dog. " * 6
    ids = tokenizer(text, return_tensors="pt").input_ids
    layers = list(range(12, 21))
    with torch.no_grad():
        dense = model(ids).logits
        with apply(model, OrthoRankConfig(layers=layers, keep_ratio=1 - 1e-9)):
            assert_close(model(ids).logits, dense)
        pruned = without_layers(model, layers)
        with apply(model, OrthoRankConfig(layers=layers, keep_ratio=0)):
            assert_close(model(ids).logits, pruned(ids).logits)
        with apply(model, OrthoRankConfig(layers=layers, keep_ratio=1 / 3)):
            alone = model(ids).logits
            pad = torch.zeros(1, 9, dtype=torch.long)
            mask = torch.cat([pad, torch.ones_like(ids)], dim=1)
            left = model(
                torch.cat([pad, ids], dim=1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
            )
            assert_close(left.logits[:, 9:], alone)
            right = model(torch.cat([ids, pad], dim=1), attention_mask=mask.flip(1))
            assert_close(right.logits[:, : ids.shape[1]], alone)
        assert (alone - dense).abs().max() > 0.1 * dense.abs().max(), "the plan must change something"
