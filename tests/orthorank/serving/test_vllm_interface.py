"""`orthorank.serving.vllm_interface`: the table, and checks that look at types and signatures, not at presence."""

import ast
import enum
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from orthorank import OrthoRankError
from orthorank.serving.vllm import hooks
from orthorank.serving.vllm_interface import checks, interface
from orthorank.serving.vllm_interface.interface import OBJECTS, expect

FOLDER = Path(hooks.__file__).parent
PAGE = Path(__file__).parents[3] / "docs" / "vllm-interface.md"


class AttentionImplBase:
    """As vLLM's, as far as it is used."""

    def __init__(self, **changed: Any) -> None:
        self.scale, self.sinks = 0.5, None
        vars(self).update(changed)

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None: ...
    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, output: Any = None
    ) -> None: ...


class AttentionMetadataBuilder: ...


def builder() -> type:
    return AttentionMetadataBuilder


Tensor = type("Tensor", (), {})
Rotary = type("Rotary", (), {"forward_native": lambda self, positions, query, key=None: None})
RotaryOfBoth = type("RotaryOfBoth", (), {"forward_native": lambda self, positions, query, key: None})
BACKEND = {"forward_includes_kv_cache_update": False, "get_name": lambda: "X", "get_builder_cls": builder}
ATTENTION = {
    "attn_backend": AttentionImplBase,
    "impl": AttentionImplBase(),
    "layer_name": "a",
    "head_size": 8,
    "kv_cache_dtype": "auto",
    "kv_cache": Tensor(),
    "sliding_window": None,
}
RIGHT: dict[str, Any] = {
    "backend": SimpleNamespace(**BACKEND),
    "attention": SimpleNamespace(**ATTENTION),
    "impl": AttentionImplBase(),
}


@pytest.mark.parametrize("name", RIGHT)
def test_objects_that_are_as_expected(name: str) -> None:
    expect(RIGHT[name], **OBJECTS[name])


WRONG: list[tuple[str, str, Any, str]] = [
    ("impl", "do_kv_cache_update", None, "do_kv_cache_update that is None, not a function"),
    ("impl", "do_kv_cache_update", lambda layer, key, value, kv_cache: None, "cannot be called with 5 arguments"),
    ("impl", "forward", lambda q, k, v: None, "forward that cannot be called with 6 arguments and output"),
    ("impl", "forward", lambda a, b, c, d, e, f: None, "unexpected keyword argument 'output'"),
    ("impl", "scale", "0.5", "scale of type str, and OrthoRank needs float or int"),
    ("impl", "sinks", [1.0], "sinks that is a list, not a Tensor or None"),
    ("attention", "impl", object(), "impl that is an object, not an AttentionImplBase"),
    ("attention", "kv_cache", [Tensor()], "kv_cache that is a list, not a Tensor"),
    ("attention", "sliding_window", (8, 8), "sliding_window that is a tuple, not an int or None"),
    ("backend", "get_builder_cls", lambda: None, "get_builder_cls that gives None, not a class"),
    ("backend", "get_builder_cls", lambda: dict, "get_builder_cls that gives dict, which is no Attention"),
    ("backend", "get_builder_cls", lambda config: dict, r"cannot be looked at \(TypeError: .*'config'"),
]


@pytest.mark.parametrize(("name", "attribute", "value", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_objects_that_are_not(name: str, attribute: str, value: Any, said: str) -> None:
    changed = SimpleNamespace(
        **{each: getattr(RIGHT[name], each) for each in OBJECTS[name] if hasattr(RIGHT[name], each)}
    )
    setattr(changed, attribute, value)
    with pytest.raises(OrthoRankError, match=rf"{said}.*tested with vLLM 0\.32"):
        expect(changed, **OBJECTS[name])
    if not isinstance(wanted := OBJECTS[name][attribute], checks.Check) or not wanted.optional:
        delattr(changed, attribute)
        with pytest.raises(OrthoRankError, match=f"vLLM's SimpleNamespace has no {attribute}, and OrthoRank needs it"):
            expect(changed, **OBJECTS[name])


def test_a_rotary_embedding_of_queries_alone() -> None:
    rotary = OBJECTS["self_attn"]["rotary_emb"]
    assert isinstance(rotary, checks.Check)
    assert rotary(Rotary()) is None
    assert rotary(RotaryOfBoth()) == "has a forward_native that needs key"
    assert "cannot be looked at (AttributeError" in (rotary(object()) or "")


def test_functions_that_are_stood_in_for() -> None:
    check = checks.begins_with("self", "request_id", "prompt", "params")
    assert check(lambda self, request_id, prompt, params, more=0: None) is None
    assert check(lambda self, prompt, request_id, params: None) == (
        "begins with the arguments self, prompt, request_id, params, not self, request_id, prompt, params"
    )
    assert check(None) == "is None, not a function"
    answered = checks.takes("self", "request")  # in vLLM's place: an argument more would be passed over
    assert answered(lambda self, request: None) is None
    assert answered(lambda self, request, more=0: None) == "has the arguments self, request, more, not self, request"
    assert answered(None) == "is None, not a function"


def test_what_cannot_be_looked_at_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class without a source, a function without a signature, a module that fails in another way than by lacking."""
    made = type("Made", (), {"__module__": "module_of_the_test"})
    module = ModuleType("module_of_the_test")
    vars(module).update(Made=made, build=vars(dict)["fromkeys"], next=next, level=enum.IntEnum("Level", "one"))
    monkeypatch.setitem(sys.modules, "module_of_the_test", module)
    group = {
        "module_of_the_test": {
            "Made": checks.that_sets("field"),
            "next": checks.called_with("iterator"),
            "level": checks.called_as(1),
        },
        "module_that_stops": {"name": checks.function},
    }

    def stop(name: str) -> Any:
        if name == "module_that_stops":
            raise RuntimeError("no driver")
        return module

    monkeypatch.setattr(checks.importlib, "import_module", stop)
    with pytest.raises(OrthoRankError) as caught:
        interface.require(group)
    said = str(caught.value)
    assert "module_of_the_test.Made cannot be looked at (" in said
    assert "module_of_the_test.next cannot be looked at (ValueError: no signature found" in said
    assert "module_that_stops.name cannot be imported (RuntimeError: no driver)" in said
    assert "module_of_the_test.level" not in said
    assert said.endswith("install that, or serve the model without a plan")


def test_needed_is_what_the_groups_name() -> None:
    for group in (interface.REGISTERED, interface.FRONT, interface.WORKER, interface.SCHEDULER):
        for module, names in group.items():
            for name, check in names.items():
                assert {*name.split("."), *check.names} <= set(interface.NEEDED[module])
    assert "scheduler_cls" in interface.NEEDED["vllm.config.scheduler"]


def test_the_table_stands_in_one_file() -> None:
    """Elsewhere nothing says what is expected of vLLM: `expect` is given entries of the table."""
    for file in sorted(FOLDER.glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "expect":
                named = [ast.unparse(given.value) for given in call.keywords]
                assert [given.arg for given in call.keywords] == [None], (file.name, named)
                assert named[0].removeprefix("interface.").startswith("OBJECTS["), (file.name, named)


def test_the_table_knows_nothing_of_the_plugin() -> None:
    """What is expected of vLLM may be read, and edited for another vLLM, by itself."""
    for file in sorted(Path(interface.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orthorank"):
                known = ("orthorank.common.errors", "orthorank.serving.vllm_interface.")
                assert node.module.startswith(known), (file.name, node.module)


def test_what_is_imported_of_vllm_is_in_the_table() -> None:
    """Every name that the package imports of vLLM, but the models that it may register and what they come with."""
    public = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SamplingParams"}
    known = {name for names in interface.NEEDED.values() for name in names} | {"current_platform", "envs"}
    known |= {name.split(".")[0] for names in interface.BENCH.values() for name in names}
    for file in sorted(FOLDER.parents[1].rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                assert {each.name for each in node.names} <= known | public, file.name


def test_each_has_its_reason() -> None:
    """On its page, which says the public way, too, where there is one."""
    groups = (interface.REGISTERED, interface.FRONT, interface.WORKER, interface.SCHEDULER, interface.BENCH)
    named = {module for group in (*groups, interface.OPTIONAL) for module in group} | set(OBJECTS)
    reasons = dict(re.findall(r"^\| `(.+?)` \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert named == set(reasons)
    assert all(reasons.values())


@pytest.mark.parametrize(
    ("chosen", "splitting", "attention"),
    [
        (None, None, ["vllm::a", hooks.OPERATOR]),
        (["vllm::a"], ["vllm::a", hooks.OPERATOR], ["vllm::a"]),
        ([], [], ["vllm::a"]),
    ],
)
def test_graphs_are_split_in_this_configuration_alone(
    chosen: list[str] | None, splitting: list[str] | None, attention: list[str]
) -> None:
    kind = type("CompilationConfig", (), {"_attention_ops": ["vllm::a"], "splitting_ops": chosen})
    config = kind()
    for _ in range(2):  # front ends may check twice
        hooks.split_graphs(config)
        assert (config.splitting_ops, config._attention_ops) == (splitting, attention)
    assert kind._attention_ops == ["vllm::a"]
