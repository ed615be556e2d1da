"""A family of one's own: its spec is compared with the dense layers of a tiny copy, and a wrong one is refused."""

import copy
import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from orthorank import FAMILIES, Family, OrthoRankConfig, OrthoRankError, apply, check_family, register_family
from orthorank.common.errors import type_of
from orthorank.families import always
from orthorank.hf import family_check
from orthorank.stack.layers import LayerStack
from tests.orthorank.families.test_families import padded
from tests.orthorank.models import MODELS, tiny
from tests.orthorank.statement import DenseRows, assert_close, call

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=0.4)
WRONG = r"the spec of .* is wrong: layer \d of a tiny copy, an? \w+, gives selected tokens other states than the dense"


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Family]]:
    """The families, which a test may change, and nothing that has passed before."""
    before = dict(FAMILIES)
    monkeypatch.setattr(family_check, "_passed", set())
    yield FAMILIES
    FAMILIES.clear()
    FAMILIES.update(before)


def of_type(model: Any, model_type: str) -> Any:
    """``model`` under another model type."""
    model.config.model_type = model_type
    return model


def test_every_spec_of_the_package_passes_on_every_tiny_model() -> None:
    for name in MODELS:
        assert check_family(tiny(name)) < 1e-5, name


# What changes no number: names, what only training or FLOPs ask, whose code the norms are.
WITHOUT_EFFECT = ("name", "home", "torch_norm", "gated", "attn_out_dropout", "mlp_out_dropout")
STATED = [
    (key, field.name)
    for key, spec in FAMILIES.items()
    for field in dataclasses.fields(Family)
    if field.name not in WITHOUT_EFFECT and getattr(spec, field.name) != field.default
    if (spec.parallel is not always, field.name) != (False, "pre_mlp_norm")  # which says the same
]


@pytest.mark.parametrize(("model_type", "field"), STATED)
def test_what_a_spec_states_is_missed_when_it_is_left_out(
    registry: dict[str, Family], model_type: str, field: str
) -> None:
    default = next(each.default for each in dataclasses.fields(Family) if each.name == field)
    registry[model_type] = dataclasses.replace(registry[model_type], **{field: default})
    refused = []
    for name, model in MODELS.items():
        if model.model_type == model_type:
            try:
                check_family(tiny(name))
            except OrthoRankError as error:
                refused.append(str(error))
    assert refused
    assert all(re.search(rf"{WRONG}|does not fit|has no", error) for error in refused)


LLAMA = Family("Like Llama")
# What somebody would write who takes the model for a Llama, or for the family that comes next to it.
GUESSES = {
    "starcoder-2": [LLAMA, Family("x", norm="layer")],  # without its window
    "nemotron": [LLAMA, Family("x", norm="layer"), Family("x", weight_offset=1.0)],
    "helium": [LLAMA, Family("x", interleaved=True, angles="pairs")],
    "glm": [LLAMA, Family("x", interleaved=True, angles="pairs")],
    "ernie-4.5": [LLAMA, Family("x", interleaved=True, angles="pairs")],
    "gpt-oss": [
        LLAMA,
        dataclasses.replace(FAMILIES["gpt_oss"], sinks=None),
        dataclasses.replace(FAMILIES["gpt_oss"], angles="halves"),
    ],
}


@pytest.mark.parametrize("name", GUESSES)
def test_a_guess_at_a_registered_family_is_refused(name: str) -> None:
    for number, guess in enumerate(GUESSES[name]):
        register_family(f"guess_{number}", guess)
        model = of_type(tiny(name), f"guess_{number}")
        for use in (lambda model=model: apply(model, PLAN), lambda model=model: LayerStack(model)):
            with pytest.raises(OrthoRankError, match=rf"{WRONG}|does not fit.*bias was given with norm='rms'"):
                use()
        assert "forward" not in vars(model.model.layers[1])


@pytest.mark.parametrize(
    "name", ["seed-oss", "arcee", "starcoder-2", "nemotron", "helium", "glm", "ernie-4.5", "gpt-oss"]
)
def test_a_registered_family_gives_the_rows_of_the_dense_layer(name: str) -> None:
    model = tiny(name)
    spec = dataclasses.replace(FAMILIES[model.config.model_type], home="")
    with pytest.raises(OrthoRankError, match=r"type 'mine', which has no spec.*orthorank\.register_family\(model_type"):
        apply(of_type(model, "mine"), PLAN)
    register_family("mine", spec)
    ids, mask = padded("left", (20, 13))
    with torch.no_grad():
        with DenseRows(model, [1, 2], 0.4) as rows:
            expected = rows(ids, mask)[mask.bool()]
        with apply(model, PLAN):
            assert_close(call(model, ids, mask)[mask.bool()], expected)


def test_a_check_runs_once_for_each_configuration_and_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    check = family_check.check_family
    monkeypatch.setattr(family_check, "check_family", lambda model: ran.append(1) or check(model))
    apply(tiny("llama-2"), PLAN).remove()
    assert len(ran) == 0, "the package's own"
    register_family("mine", LLAMA)
    model = of_type(tiny("llama-2"), "mine")
    for _ in range(2):
        LayerStack(copy.deepcopy(model))
        apply(model, PLAN).remove()
    assert len(ran) == 1
    apply(of_type(tiny("llama-3"), "mine"), PLAN).remove()
    assert len(ran) == 2, "another configuration"
    register_family("mine", dataclasses.replace(LLAMA, norm="module"))
    apply(model, PLAN).remove()
    assert len(ran) == 3, "another spec"


def test_it_takes_less_than_a_second_and_leaves_the_random_numbers_as_they_were() -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):  # 70 billion parameters, of which none is there
        large = CONFIG_MAPPING["llama"](
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256, pad_token_id=128004,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(large)
    before, begin = torch.get_rng_state(), time.process_time()
    assert check_family(model) < 1e-5
    assert time.process_time() - begin < 1
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config.num_hidden_layers == 80


def test_a_copy_has_a_layer_of_each_kind_and_windows_that_matter() -> None:
    from transformers import Gemma3TextConfig, LlamaConfig

    config = Gemma3TextConfig(num_hidden_layers=26, head_dim=256)
    small = family_check.shrunk(config)
    assert small.layer_types == [*["sliding_attention"] * 4, "full_attention"]
    assert (small.num_hidden_layers, small.sliding_window, small.head_dim) == (5, 7, 256)
    assert len(config.layer_types) == 26
    grouped = family_check.shrunk(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096))
    assert (grouped.num_attention_heads, grouped.num_key_value_heads, grouped.hidden_size) == (4, 2, 512)
    alone = family_check.shrunk(LlamaConfig(num_attention_heads=32, num_key_value_heads=32, hidden_size=4096))
    assert (alone.num_attention_heads, alone.num_key_value_heads, alone.hidden_size) == (2, 2, 256)


class Scaled(nn.Module):
    """A norm that the kernels do not know: divided by the mean of the absolute values."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.weight.detach().clone())
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)


def with_norms_of_its_own() -> Any:
    """A Llama whose decoder makes its layers with another norm."""
    from transformers import LlamaModel

    class OtherModel(LlamaModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.layers:
                layer.input_layernorm = Scaled(layer.input_layernorm)
                layer.post_attention_layernorm = Scaled(layer.post_attention_layernorm)

    model = tiny("llama-2")
    model.model = OtherModel(model.config).eval()
    return of_type(model, "scaled")


def test_a_norm_that_the_kernels_do_not_know_is_called() -> None:
    model = with_norms_of_its_own()
    register_family("scaled", LLAMA)
    with pytest.raises(OrthoRankError, match=WRONG):
        apply(model, PLAN)
    register_family("scaled", Family("Scaled", norm="module"))
    ids, mask = padded("left", (20, 13))
    with torch.no_grad():
        with DenseRows(model, [1, 2], 0.4) as rows:
            expected = rows(ids, mask)[mask.bool()]
        with apply(model, PLAN):
            assert_close(call(model, ids, mask)[mask.bool()], expected)


@pytest.mark.parametrize(("rate", "name"), [("residual_dropout", "seed-oss"), ("residual_dropout", "starcoder-2")])
def test_rates_of_dropout_that_attention_has(rate: str, name: str) -> None:
    model = tiny(name, **{rate: 1 - 1e-7}, attention_dropout=0.0)
    ids = torch.arange(3, 15)[None]
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=0.5)):
        assert changes(model, ids) > 0.1
        model.model.layers[1].train()
        assert changes(model, ids) < 1e-5


def changes(model: Any, ids: torch.Tensor) -> float:
    """The most that layer 1 adds to any token."""
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    return (states[2] - states[1]).abs().max().item()


def test_sink_logits_among_the_selected_alone() -> None:
    """``kv="selected"`` of GPT-OSS, by a mask where the window is small, and without one: dense with every token."""
    for window in (7, 100):
        model = tiny("gpt-oss", sliding_window=window)
        ids, mask = padded("right", (20, 20))
        with torch.no_grad():
            dense = call(model, ids, mask)
            with apply(model, OrthoRankConfig(layers=[0, 1], keep_ratio=1 - 1e-9, kv="selected")):
                assert_close(call(model, ids, mask), dense)


@pytest.mark.parametrize(
    ("model_type", "family", "message"),
    [
        ("", LLAMA, "model_type is ''; it must be the model_type of a model's config"),
        (3, LLAMA, "model_type is 3;"),
        ("mine", "llama", r"family is a str; it must be an orthorank\.Family"),
        ("llama", LLAMA, "model_type is 'llama', of which the package has a spec, Llama, that its tests hold"),
    ],
)
def test_what_is_registered_is_checked(model_type: Any, family: Any, message: str) -> None:
    with pytest.raises(OrthoRankError, match=message):
        register_family(model_type, family)
    assert FAMILIES["llama"].name == "Llama"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm", "rmsnorm", "norm of the family 'x' is 'rmsnorm'; it may be rms, layer, module"),
        ("angles", "interleaved", "angles of the family 'x' is 'interleaved'; it may be halves, pairs, once"),
    ],
)
def test_words_of_a_spec_are_checked(field: str, value: str, message: str) -> None:
    with pytest.raises(OrthoRankError, match=message):
        Family("x", **{field: value})


def test_a_spec_that_cannot_be_run_is_refused_by_what_it_lacks() -> None:
    model = of_type(tiny("llama-2"), "mine")
    for family, lack in (
        (Family("x", input_norm="ln_1"), "a LlamaDecoderLayer has no ln_1, which x layers have"),
        (Family("x", qkv="qkv"), "a LlamaAttention has no qkv"),
        (Family("x", softcap="cap"), "cannot be run from its parts.*AttributeError.*cap"),
    ):
        register_family("mine", family)
        with pytest.raises(OrthoRankError, match=lack):
            apply(model, PLAN)


def test_what_a_registered_spec_lacks_is_not_put_down_to_transformers() -> None:
    model = of_type(tiny("llama-2"), "mine")
    for family, remedy in (
        (Family("x", input_norm="ln_1"), "has no ln_1.* say in its orthorank.Family what they are called"),
        (Family("x", qkv="qkv"), "has no qkv.* of these names, an orthorank.Family can say qkv alone"),
    ):
        register_family("mine", family)
        with pytest.raises(OrthoRankError, match=remedy) as error:
            check_family(model)
        assert "newer" not in str(error.value)


@pytest.mark.parametrize("config", ["small", {"hidden_size": 32}, 3])
def test_a_configuration_that_is_none_is_refused_by_name(config: Any) -> None:
    with pytest.raises(OrthoRankError, match=rf"config is {type_of(config)}; it must be a small configuration"):
        check_family(tiny("llama-2"), config)


def test_a_configuration_without_the_usual_names_is_a_sentence() -> None:
    model = of_type(tiny("llama-2"), "mine")
    vars(model.config)["num_attention_heads"] = None
    register_family("mine", LLAMA)
    with pytest.raises(OrthoRankError, match=r"cannot be checked.*TypeError.*small configuration.*config=\.\.\."):
        check_family(model)


def test_a_configuration_that_cannot_be_made_small_takes_one_by_hand() -> None:
    from transformers import LlamaModel

    class WideModel(LlamaModel):
        """Has a size under a name of its own."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.table = nn.Parameter(torch.zeros(config.rows_of_table, 1024))

    config = copy.deepcopy(tiny("llama-2").config)
    config.rows_of_table, config.model_type = 2**17, "wide"
    with torch.device("meta"):
        model = WideModel(config)
    register_family("wide", LLAMA)
    with pytest.raises(OrthoRankError, match=r"it would have 134,\d+,\d+ parameters\); make a small.*config=\.\.\."):
        check_family(model)
    small = copy.deepcopy(config)
    small.rows_of_table = 1
    assert check_family(model, small) < 1e-5
    assert family_check.checked_family(model) is FAMILIES["wide"], "it has passed"


def test_layers_of_another_manner_are_refused() -> None:
    from transformers import LlamaModel

    class Tupled(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return (self.layer(*args, **kwargs),)

    class First(nn.Module):
        def forward(self, output: Any) -> Any:
            return output[0]

    class OldModel(LlamaModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layers = nn.ModuleList(Tupled(layer) for layer in self.layers[:1])
            self.norm = First()

    model = tiny("llama-2", num_hidden_layers=1)
    model.model = OldModel(model.config).eval()
    register_family("old", LLAMA)
    with pytest.raises(OrthoRankError, match="a Tupled, returns a tuple; layers as transformers 5 has them"):
        check_family(of_type(model, "old"))
