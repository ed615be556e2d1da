"""Criteria of one's own: registered, refused, and selecting as stated, in every home of the method."""

import importlib
import importlib.util
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, OrthoRankError, apply, context, register_criterion
from orthorank.calibration.thresholds import calibrate
from orthorank.cli import main
from orthorank.common import criteria
from orthorank.evaluation.answer_cache import owner_of
from orthorank.hf import ablations
from orthorank.packed import plans
from orthorank.reproduce.subject import measured_of, plan_key
from orthorank.search.settings import SearchSettings
from orthorank.stack.layers import LayerStack
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.statement import assert_close

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "criteria.md").read_text(encoding="utf-8")


def largest(x: Tensor, sink: Tensor, valid: Tensor) -> Tensor:
    return -x.float().abs().amax(dim=-1)  # their lengths are all but alike


def far_from_mean(x: Tensor, sink: Tensor, valid: Tensor) -> Tensor:
    there = valid[:, :, None]
    mean = torch.where(there, x.float(), 0).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    return -(x.float() - mean).norm(dim=-1)


def blind_mean(x: Tensor, sink: Tensor, valid: Tensor) -> Tensor:
    return (x.float() - x.float().mean(1, keepdim=True)).norm(dim=-1)


def queries_against_sink(x: Tensor, sink: Tensor, valid: Tensor, **given: Any) -> Tensor:
    keys, queries = (given[name].float() for name in ("sink_keys", "queries"))
    groups = queries.shape[1] // keys.shape[1]
    return (queries * keys.repeat_interleave(groups, 1)[:, :, None]).sum((1, 3)).abs()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test registers, only this test knows."""
    before = dict(criteria._REGISTERED)
    yield
    criteria._REGISTERED.clear()
    criteria._REGISTERED.update(before)


@pytest.fixture
def registered() -> None:
    register_criterion("largest", largest, pointwise=True)
    register_criterion("far_from_mean", far_from_mean, pointwise=False)
    register_criterion("queries", queries_against_sink, pointwise=True, needs=("sink_keys", "queries"))


def seen(model: Any, plan: OrthoRankConfig, ids: Tensor, **how: Any) -> list[int]:
    """The positions that the plan's one layer selects of one row."""
    found: list[list[int]] = []
    with apply(model, plan) as handle, torch.no_grad(), handle.watching(lambda _, p, call: found.append(p[0].tolist())):
        model(ids, use_cache=False, **how)
    return [p for p in found[0] if p >= 0]


@pytest.mark.parametrize("name", ["largest", "far_from_mean", "queries"])
def test_the_smallest_are_selected(tiny_model: Any, registered: None, name: str) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 20, seed=4)
    stack = LayerStack(model)
    inputs = stack.embed(ids)
    states = stack.normed(0, inputs.hidden_states)[0]
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        if name == "largest":
            values = [-float(row.abs().max()) for row in states]
        elif name == "far_from_mean":
            values = [-float((row - states.mean(0)).norm()) for row in states]
        else:
            sink = attention.k_proj(states[0]).view(2, 16).repeat_interleave(2, 0)
            values = [float((attention.q_proj(row).view(4, 16) * sink).sum().abs()) for row in states]
    expected = sorted(sorted(range(1, 20), key=values.__getitem__)[:8])
    assert seen(model, OrthoRankConfig(layers=[0], keep_ratio=0.4, criterion=name), ids) == expected
    ranks = stack.ranks(0, inputs.hidden_states, inputs, criterion=name)
    torch.testing.assert_close(ranks[0].tolist(), values, rtol=1e-4, atol=1e-4)
    forced = seen(model, OrthoRankConfig(layers=[0], keep_ratio=0.4, criterion=name, update_sink=True), ids)
    assert forced[0] == 0
    assert len(forced) == 8


@pytest.mark.parametrize("name", ["largest", "far_from_mean", "queries"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("select", [{}, {"select": "window", "select_window": 6}])
def test_a_row_alone_equals_the_row_in_a_batch(
    tiny_model: Any, registered: None, name: str, side: str, select: dict[str, Any]
) -> None:
    model, lengths = tiny_model("qwen2"), (21, 1, 13)
    batch, mask = torch.zeros(3, 21, dtype=torch.long), torch.zeros(3, 21, dtype=torch.long)
    rows = [ids_of(1, n, seed=n) for n in lengths]
    spans = [slice(21 - n, 21) if side == "left" else slice(0, n) for n in lengths]
    for i, (ids, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span], mask[i, span] = ids[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.4, criterion=name, **select)), torch.no_grad():
        together = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for i, (ids, span) in enumerate(zip(rows, spans, strict=True)):
            assert_close(together[i : i + 1, span], model(ids, use_cache=False).logits)


def test_what_follows_the_context_is_not_looked_at(tiny_model: Any, registered: None) -> None:
    model, ids = tiny_model("llama"), ids_of(2, 15)
    plan = OrthoRankConfig(layers=[0], keep_ratio=0.4, criterion="far_from_mean")
    with apply(model, plan) as handle, torch.no_grad(), context(model, 10, keep_last=0):
        found: list[Tensor] = []
        with handle.watching(lambda layer, positions, call: found.append(positions)):
            model(ids, use_cache=False)
    for row in range(2):
        assert found[0][row].tolist() == [*seen(model, plan, ids[row : row + 1, :10]), *range(10, 15)]


@pytest.mark.parametrize("name", ["largest", "queries"])
def test_a_pointwise_one_takes_any_chunks_and_thresholds(tiny_model: Any, registered: None, name: str) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 40, seed=5)
    plan = calibrate(
        model, ids.view(2, 20), OrthoRankConfig(layers=[1, 2], keep_ratio=0.4, criterion=name, keep_last=0)
    )
    with apply(model, plan) as handle, torch.no_grad():
        whole = model(ids).logits
        assert 0 < handle.stats[1].tokens_updated < 40
        cache, parts = None, []
        for chunk in ids.split((13, 2, 25), dim=1):
            output = model(chunk, past_key_values=cache)
            cache = output.past_key_values
            parts.append(output.logits)
    assert_close(torch.cat(parts, 1), whole)


def test_what_looks_at_other_tokens_is_refused(tiny_model: Any, registered: None) -> None:
    model, ids, name = tiny_model("llama"), ids_of(1, 12), "far_from_mean"
    with pytest.raises(OrthoRankError, match=r"'far_from_mean'.*pointwise=False.*select='threshold'"):
        OrthoRankConfig(layers=[1], criterion=name, select="threshold", thresholds={1: 0.5})
    plan = OrthoRankConfig(layers=[1], criterion=name)
    with pytest.raises(OrthoRankError, match=r"pointwise=False.*thresholds"):
        calibrate(model, ids, plan)
    assert "registered with pointwise=False" in next(plans.obstacles(plan))
    with apply(model, plan) as handle, torch.no_grad():
        cache = model(ids[:, :6]).past_key_values
        with pytest.raises(OrthoRankError, match=r"a chunk over 6 cached tokens: give the prompt in one call"):
            model(ids[:, 6:], past_key_values=cache)
        model(ids[:, 6:7], past_key_values=cache)
        with handle.decoding():
            model(ids[:, 7:], past_key_values=cache)
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_an_edit_under_an_applied_plan_counts(tiny_model: Any, registered: None) -> None:
    """A function that is registered again while a plan names it may look at other tokens now."""
    model, ids = tiny_model("llama"), ids_of(1, 12)
    with apply(model, OrthoRankConfig(layers=[1], criterion="largest")), torch.no_grad():
        cache = model(ids[:, :6]).past_key_values
        model(ids[:, 6:9], past_key_values=cache)
        register_criterion("largest", largest, pointwise=False)
        with pytest.raises(OrthoRankError, match="a chunk over 9 cached tokens"):
            model(ids[:, 9:], past_key_values=cache)


def test_servers_take_what_is_pointwise_and_needs_no_more_than_they_have(registered: None) -> None:
    register_criterion("scored", lambda x, sink, valid, scores: -scores, pointwise=True, needs=("scores",))
    assert not list(plans.obstacles(OrthoRankConfig(layers=[1], criterion="largest")))
    assert not list(plans.obstacles(OrthoRankConfig(layers=[1], criterion="scored")))
    assert "'queries', registered with sink_keys, queries" in next(
        plans.obstacles(OrthoRankConfig(layers=[1], criterion="queries"))
    )
    register_criterion("before", largest, pointwise=True, normed=False)
    assert "normed=False" in next(plans.obstacles(OrthoRankConfig(layers=[1], criterion="before")))


@pytest.mark.parametrize(
    ("fn", "how", "words"),
    [
        (blind_mean, {"pointwise": False}, r"padding on the left: they differ by [\d.]+ of the largest"),
        (far_from_mean, {"pointwise": True}, "said to be pointwise.*register it with pointwise=False"),
        (lambda x, sink, valid: torch.rand(x.shape[:2]), {"pointwise": False}, "other values alone"),
        (lambda x, sink, valid: x.double().sum(-1), {"pointwise": True}, "gave a float64 tensor of shape"),
        (lambda x, sink, valid: x.sum((1, 2)), {"pointwise": True}, r"must give a float32 tensor of shape \[4, 12\]"),
        (lambda x, sink, valid: 1.0, {"pointwise": True}, "gave a float for"),
        (lambda x, sink: x, {"pointwise": True}, "fails with TypeError"),
        (lambda x, sink, valid: x.mul_(2).norm(dim=-1), {"pointwise": True}, "writes into x"),
        (lambda x, sink, valid: x @ torch.ones(3), {"pointwise": True}, "fails with RuntimeError.*'x': .*64"),
        (largest, {"pointwise": True, "needs": "keys"}, "needs is 'keys'; it must be a list of"),
        (largest, {"pointwise": True, "needs": ("values",)}, "with 'values'; it must be a list of 'scores', 'keys'"),
        (largest, {"pointwise": True, "needs": ("keys",), "normed": False}, "normed is False"),
        (largest, {"pointwise": 1}, "pointwise is 1; it must be True or False"),
        (3, {"pointwise": True}, "fn is an int"),
        (
            lambda x, sink, valid: x.float().sum(-1).to("meta"),
            {"pointwise": True},
            r"on meta for .* on the same device",
        ),
        (lambda x, sink, valid: x.float().sum(-1).to_sparse(), {"pointwise": True}, "gave a sparse_coo float32 tensor"),
        (largest, {"pointwise": True, "needs": None}, "needs is None; it must be a list of"),
        (largest, {"pointwise": True, "normed": "no"}, "normed is 'no'; it must be True or False"),
        (largest, {"pointwise": True, "hidden_size": 0}, "hidden_size is 0; it must be an integer, 1 or more"),
        (largest, {"pointwise": True, "hidden_size": "64"}, "hidden_size is '64'; it must be an integer"),
    ],
)
def test_registering_refuses(fn: Any, how: dict[str, Any], words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        register_criterion("tried", fn, **how)
    assert "tried" not in criteria.names()


def test_values_may_lie_in_memory_as_they_like(tiny_model: Any) -> None:
    """What the kernels ask of strides is nothing that a user of `register_criterion` knows."""
    model, ids = tiny_model("llama"), ids_of(3, 20)
    found = {}
    for name, fn in {
        "plain": lambda x, sink, valid: x[..., 0].contiguous(),
        "a_view": lambda x, sink, valid: x[..., 0],
        "turned": lambda x, sink, valid: x[..., 0].t().contiguous().t(),
    }.items():
        register_criterion(name, fn, pointwise=True)
        with apply(model, OrthoRankConfig(layers=[1], criterion=name)), torch.no_grad():
            found[name] = model(ids, use_cache=False).logits
    assert torch.equal(found["a_view"], found["plain"])
    assert torch.equal(found["turned"], found["plain"])


@pytest.mark.parametrize("name", ["", "two words", "1st", "orthogonal", "inverse", None])
def test_names_that_it_may_not_have(name: Any) -> None:
    with pytest.raises(OrthoRankError, match="name is "):
        register_criterion(name, largest, pointwise=True)


def test_a_name_belongs_to_one_function() -> None:
    register_criterion("mine", largest, pointwise=True)
    register_criterion("mine", largest, pointwise=False)
    assert not criteria.is_pointwise("mine"), "the second time counts"
    with pytest.raises(OrthoRankError, match=r"registered as .*largest; choose another name for .*far_from_mean"):
        register_criterion("mine", far_from_mean, pointwise=False)


def test_a_function_of_one_width() -> None:
    register_criterion("wide", lambda x, sink, valid: x @ torch.ones(48), pointwise=True, hidden_size=48)


@pytest.mark.parametrize("name", ["inverse", "random", "prenorm"])
def test_the_ablations_keep_to_the_same(name: str) -> None:
    from orthorank.common.criteria_check import check_rows

    found = criteria.find(name)
    check_rows(name, found, found.pointwise, found.needs, 64)
    assert found.score.__module__ == ablations.__name__


def test_an_unknown_name_says_what_registers_it(tmp_path: Path) -> None:
    file = tmp_path / "orthorank.json"
    for name, module in (("mine", "the module"), ("my_module:fn", "my_module")):
        file.write_text(f'{{"layers": [2], "criterion": "{name}"}}')
        with pytest.raises(OrthoRankError) as error:
            OrthoRankConfig.from_pretrained(file)
        option = name if ":" in name else "module:function"
        for words in (
            f"criterion is '{name}'; it may be 'orthogonal' or ",
            f"import {module} and call orthorank.register_criterion('{name}', ...)",
            f"give --criterion {option}",
            "as an entry point of orthorank.criteria",
        ):
            assert words in str(error.value)
    assert "my_module" not in sys.modules


def write_module(folder: Path, name: str, code: str) -> None:
    body = "import torch\nfrom orthorank import register_criterion\n\n\ndef fn(x, sink, valid):\n"
    (folder / f"{name}.py").write_text(f"{body}    return x.float().norm(dim=-1)\n\n\n{code}\n")


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("of_this_test"):
            del sys.modules[name]


def test_module_and_function(in_folder: Path) -> None:
    path = list(sys.path)
    write_module(in_folder, "of_this_test_bare", "")
    assert criteria.given("of_this_test_bare:fn") == "of_this_test_bare:fn"
    assert criteria.given("of_this_test_bare:fn") == "of_this_test_bare:fn"
    assert not criteria.is_pointwise("of_this_test_bare:fn")
    assert OrthoRankConfig(layers=[1], criterion="of_this_test_bare:fn").criterion == "of_this_test_bare:fn"
    write_module(in_folder, "of_this_test_named", "register_criterion('named', fn, pointwise=True)")
    assert criteria.given("of_this_test_named:fn") == "named"
    assert criteria.given("named") == "named"
    assert criteria.given("cosine") == "cosine"
    for wrong in ("of_this_test_none:fn", "of_this_test_bare:gone", "of_this_test_bare:"):
        with pytest.raises(OrthoRankError, match="which cannot be imported"):
            criteria.given(wrong)
    assert sys.path == path


@pytest.mark.parametrize("code", ["1 / 0", "import gone_from_here", "raise SystemExit(0)", "def unfinished("])
def test_a_module_that_fails_is_an_error_in_a_sentence(
    in_folder: Path, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    write_module(in_folder, "of_this_test_failing", code)
    assert main(["search", "--criterion", "of_this_test_failing:fn"]) == 2
    assert re.search(
        r"criterion is 'of_this_test_failing:fn', which cannot be imported \(\w+(Error|Exit): .*\); it must be",
        capsys.readouterr().err,
    )
    with pytest.raises(OrthoRankError, match=r"criterion is '\./here:fn', which cannot be imported"):
        criteria.given("./here:fn")


def test_an_entry_point_is_loaded_when_a_plan_names_it(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(in_folder, "of_this_test_installed", "register_criterion('offered', fn, pointwise=True)")
    about = in_folder / "of_this_test-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: of-this-test\nVersion: 1.0\n")
    points = "[orthorank.criteria]\noffered = of_this_test_installed\nforgotten = of_this_test_installed\n"
    points += "broken = of_this_test_gone\n"
    (about / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(in_folder))
    OrthoRankConfig(layers=[1], criterion="cosine")
    assert "of_this_test_installed" not in sys.modules
    assert OrthoRankConfig(layers=[1], criterion="offered").criterion == "offered"
    with pytest.raises(OrthoRankError, match=r"entry point 'forgotten' .* registers no criterion of this name"):
        OrthoRankConfig(layers=[1], criterion="forgotten")
    with pytest.raises(OrthoRankError, match=r"criterion is 'broken', .*, of_this_test_gone, cannot be imported"):
        OrthoRankConfig(layers=[1], criterion="broken")


def test_patched_models_travel_with_the_name_alone(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 12)
    register_criterion("here", lambda x, sink, valid: x.float().norm(dim=-1), pointwise=True)
    with apply(model, OrthoRankConfig(layers=[1], criterion="here")), torch.no_grad():
        again = pickle.loads(pickle.dumps(model))
        assert_close(again(ids).logits, model(ids).logits)
        del criteria._REGISTERED["here"]
        with pytest.raises(OrthoRankError, match=r"criterion is 'here'.*not registered here"):
            again(ids)


def test_searches_take_registered_names(registered: None, tmp_path: Path) -> None:
    assert SearchSettings(output=tmp_path, criterion="far_from_mean").criterion == "far_from_mean"
    with pytest.raises(OrthoRankError, match="criterion is 'other'"):
        SearchSettings(output=tmp_path, criterion="other")


def test_search_and_eval_on_the_command_line(
    tiny_folder: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module(in_folder, "of_this_test_cli", "")
    (in_folder / "text.txt").write_text("The harbour was quiet before sunrise. " * 60)
    model, own = str(tiny_folder), "of_this_test_cli:fn"
    common = ["--text", "text.txt", "--device", "cpu"]
    search = ["search", model, "--layers", "1", "--windows", "1", "--window", "32", "--no-sink-floor", *common]
    assert main([*search, "--criterion", own, "--output", "found"]) == 0
    assert f'"criterion": "{own}"' in (in_folder / "found" / "orthorank.json").read_text()
    evaluate = ["eval", "ppl", model, "--plan", "found", "--window", "32", "--windows", "1", *common]
    del criteria._REGISTERED[own]
    assert main(evaluate) == 2
    assert f"give --criterion {own}" in capsys.readouterr().err
    assert main([*evaluate, "--criterion", own]) == 0


def test_kept_results_are_of_the_code_that_gave_them(
    tiny_folder: Path, tiny_model: Any, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that finds figures of an earlier run goes by `code_of`, beside the criterion's name."""

    def edited(code: str) -> dict[str, str]:
        criteria._REGISTERED.pop("of_this_test_edited:fn", None)
        sys.modules.pop("of_this_test_edited", None)
        importlib.invalidate_caches()
        write_module(in_folder, "of_this_test_edited", code)
        return criteria.code_of(criteria.given("of_this_test_edited:fn"))

    (in_folder / "text.txt").write_text("The harbour was quiet before sunrise. " * 60)
    search = ["search", str(tiny_folder), "--layers", "1", "--windows", "1", "--window", "32", "--no-sink-floor"]
    search += ["--text", "text.txt", "--device", "cpu", "--criterion", "of_this_test_edited:fn", "--output", "found"]
    first, again, other = edited("a = 1"), edited("a = 1"), edited("a = 222")
    assert first == again != other
    assert criteria.code_of("inverse") == {}, "what earlier versions wrote of built-in ones still fits"
    assert main(search) == 0
    assert main([*search, "--resume"]) == 0
    edited("a = 3333")
    assert main([*search, "--resume"]) == 2
    assert "is of another search: its criterion_code is" in capsys.readouterr().err
    plan = OrthoRankConfig.from_pretrained("found")
    now = criteria.code_of(plan.criterion)
    assert now not in ({}, first, other)
    for fields in (measured_of(plan), owner_of(tiny_model("llama"), plan, False, {})["plan"]):
        assert fields is not None
        assert now.items() <= fields.items()
    assert measured_of(OrthoRankConfig(layers=[1])) == plan_key(OrthoRankConfig(layers=[1]))


def test_code_that_lies_in_no_file() -> None:
    """In a notebook the functions themselves are compared."""
    codes = []
    for body in ("x.float().norm(dim=-1)", "x.float().norm(dim=-1)", "-x.float().norm(dim=-1)"):
        names: dict[str, Any] = {"__name__": "a_notebook"}
        exec(f"def fn(x, sink, valid):\n    return {body}", names)
        register_criterion("mine", names["fn"], pointwise=True)
        codes.append(criteria.code_of("mine"))
    assert codes[0] == codes[1] != codes[2]


def test_the_page_runs(tiny_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    names: dict[str, Any] = {"model": tiny_model("llama"), "ids": ids_of(2, 12)}
    with torch.no_grad():
        exec(compile(block, "docs/criteria.md", "exec"), names)
    assert "tokens_updated=8" in capsys.readouterr().out


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("own_criterion", ROOT / "examples" / "own_criterion.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["orthogonal", "keys_far_from_sink"]
    assert all(len(re.findall(r"\d+", line)) == 4 for line in lines)
    assert criteria.is_pointwise("keys_far_from_sink")
