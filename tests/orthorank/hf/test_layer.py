"""The selected layer against a statement of the method that shares no code with it, for every family."""

from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, apply, status
from tests.orthorank.statement import assert_close, logits

# Two windows smaller than the prompt, on all layers (Mistral) and on the last two (Qwen2).
WINDOWS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
}


def ids_of(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 33])
def test_matches_the_naive_statement(tiny_model: Any, family: str, windowed: bool, tokens: int) -> None:
    model = tiny_model(family, **(WINDOWS[family] if windowed else {"sliding_window": None}))
    ids = ids_of(1, tokens)
    expected = logits(model, ids, [1, 2, 3], k=tokens // 3)
    with apply(model, OrthoRankConfig(layers=[1, 2, 3], keep_ratio=1 / 3)), torch.no_grad():
        assert_close(model(ids).logits, expected)
        assert_close(model(ids, use_cache=False).logits, expected)


def test_windows_matter(tiny_model: Any) -> None:
    """The test above would notice a window that is ignored."""
    ids = ids_of(1, 33)
    wide, narrow = (tiny_model("mistral", sliding_window=w) for w in (None, 7))
    difference = logits(wide, ids, [1, 2], k=11) - logits(narrow, ids, [1, 2], k=11)
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_attention_implementation(tiny_model: Any, family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    ids = ids_of(1, 20)
    expected = logits(model, ids, [1, 2], k=10)
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.5)), torch.no_grad():
        assert_close(model(ids).logits, expected)


def test_inverse_selects_the_least_orthogonal(tiny_model: Any) -> None:
    model = tiny_model("llama")
    ids = ids_of(1, 30)
    expected = logits(model, ids, [1, 2], k=10, sign=-1.0)
    opposite = logits(model, ids, [1, 2], k=10)
    with apply(model, OrthoRankConfig(layers=[1, 2], criterion="inverse")), torch.no_grad():
        actual = model(ids).logits
    assert_close(actual, expected)
    assert (actual - opposite).abs().max() > 0.1


def test_keep_last_counts_inside_the_ratio(tiny_model: Any) -> None:
    model = tiny_model("llama")
    ids = ids_of(1, 30)
    expected = logits(model, ids, [1, 2], k=10, keep_last=4)
    handle = apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3))
    with handle.prefilling(keep_last=4), torch.no_grad():
        assert_close(model(ids).logits, expected)
    handle.remove()


def test_hidden_states_stay_complete_and_right(tiny_model: Any, family: str) -> None:
    """Every layer's output is reported, and no later layer writes into an earlier one's."""
    model = tiny_model(family)
    ids = ids_of(1, 12)
    with torch.no_grad():
        dense = model(ids, output_hidden_states=True).hidden_states
    handle = apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3))
    outputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, a, out: outputs.append(out.clone())) for layer in model.model.layers]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(dense) == 5
    assert torch.equal(states[0], dense[0])
    assert torch.equal(states[1], dense[1])
    for state, output in zip(states[1:4], outputs[:3], strict=True):
        assert torch.equal(state, output)
    changed = (states[2] != states[1]).any(dim=-1).sum()
    assert changed == 4, "layer 1 updates a third of 12 tokens"
    for hook in hooks:
        hook.remove()
    handle.remove()


def test_output_attentions_is_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with apply(model, OrthoRankConfig(layers=[1])), pytest.raises(ValueError, match="output_attentions is True"):
        model(ids_of(1, 8), output_attentions=True)
    assert model(ids_of(1, 8), output_attentions=True).attentions is not None


def test_status_counts_tokens(tiny_model: Any) -> None:
    model = tiny_model("llama")
    mask = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.25)), torch.no_grad():
        model(ids_of(2, 12), attention_mask=mask)
        rows = status(model).rows
        assert [row.mode for row in rows] == ["dense", "selected", "selected", "dense"]
        assert (rows[1].calls, rows[1].tokens_in, rows[1].tokens_updated) == (1, 20, 5)
        assert "selected" in str(status(model))
    with pytest.raises(ValueError, match="no plan is applied"):
        status(model)


def test_a_handle_says_what_it_does(tiny_model: Any) -> None:
    """Of 12 tokens a quarter and then three generated ones; the generated ones stand apart."""
    model = tiny_model("llama")
    plan = OrthoRankConfig(layers=[0, 1, 3], keep_ratio=0.25, keep_ratios={3: 0})
    handle = apply(model, plan)
    model.generate(ids_of(1, 12), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    lines = str(handle).splitlines()
    assert lines[1].split() == ["0", "selected", "0.250", "4", "12", "3", "0.250", "3"]
    assert lines[4] == "dense: 2"
    assert str(handle) == str(status(model))
    assert repr(handle) == "<Handle: layers 0, 1 select; layers 3 removed; applied to a LlamaForCausalLM>"
    handle.remove()
    assert repr(handle).endswith("was removed from a LlamaForCausalLM>")


def test_gradients_flow_through_the_reference(tiny_model: Any) -> None:
    """A training step works: the selected layer's weights get the gradients of the naive statement."""
    model = tiny_model("llama")
    ids = ids_of(1, 12)
    with apply(model, OrthoRankConfig(layers=[1])):
        loss = model(ids, labels=ids).loss
        loss.backward()
    weight = model.model.layers[1].mlp.down_proj.weight
    assert weight.grad is not None
    direction = weight.grad / weight.grad.norm()
    step = 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
        with apply(model, OrthoRankConfig(layers=[1])), torch.no_grad():
            values.append(float(model(ids, labels=ids).loss))
        with torch.no_grad():
            weight.sub_(sign * step * direction)
    numeric = (values[0] - values[1]) / (2 * step)
    assert abs(numeric - float(weight.grad.norm())) < 0.02 * abs(numeric)


class Doubled(torch.nn.Module):
    """Stands for what replaces a projection: a quantised or an adapted one."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("changed", ["gate_proj", "up_proj", "down_proj", "act_fn", "mlp", "activation", "hook"])
def test_a_changed_mlp_is_what_it_was_changed_to(tiny_model: Any, family: str, changed: str) -> None:
    """Activation and product are one op where the MLP is plain SwiGLU; a projection, a hook or more may be changed."""
    model = tiny_model(family)
    seen = []
    for layer in model.model.layers:
        mlp = layer.mlp
        if changed == "mlp":
            layer.mlp = Doubled(mlp)
        elif changed == "activation":
            mlp.act_fn = torch.nn.GELU()
        elif changed == "hook":
            mlp.register_forward_hook(lambda module, given, result: seen.append(result.shape) or 2 * result)
        else:
            setattr(mlp, changed, Doubled(getattr(mlp, changed)))
    ids = ids_of(1, 12)
    plain, expected = logits(tiny_model(family), ids, [1, 2], k=4), logits(model, ids, [1, 2], k=4)
    assert (plain - expected).abs().max() > 0.1
    seen.clear()
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)), torch.no_grad():
        assert_close(model(ids).logits, expected)
    if changed == "hook":
        assert [shape[1] for shape in seen] == [12, 4, 4, 12]
