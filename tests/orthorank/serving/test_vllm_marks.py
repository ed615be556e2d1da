"""`orthorank.serving.vllm.hooks.watch_prompts`: what requests are told of their prompts, without vLLM."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from orthorank.serving.vllm import hooks
from orthorank.serving.vllm.rules import dense_salt


class Params:
    """Of sampling."""

    def __init__(self, **extra: Any) -> None:
        self.extra_args = extra or None


class InputProcessor:
    """As vLLM's, as far as it is used."""

    def __init__(self, plan: dict[str, Any] | None) -> None:
        config = SimpleNamespace() if plan is None else SimpleNamespace(orthorank={"plan": plan})
        self.model_config = SimpleNamespace(hf_config=config)

    def process_inputs(self, request_id: str, prompt: dict[str, Any], params: Params) -> Any:
        ids, salt = prompt["prompt_token_ids"], prompt.get("cache_salt")
        return SimpleNamespace(prompt_token_ids=ids, sampling_params=params, pooling_params=None, cache_salt=salt)


class BeamSearchSequence:
    """The same."""

    def __init__(self, ids: list[int], generated: list[int]) -> None:
        self.orig_prompt, self.tokens = {"prompt_token_ids": ids}, ids + generated

    def get_prompt(self) -> dict[str, Any]:
        return {"type": "token", "prompt_token_ids": self.tokens}


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks, on these classes in place of vLLM's."""
    names = {
        "vllm.entrypoints.generate.beam_search.utils": {"BeamSearchSequence": BeamSearchSequence},
        "vllm.exceptions": {"VLLMValidationError": ValueError},
        "vllm.v1.engine.input_processor": {"InputProcessor": InputProcessor},
    }
    for module, held in names.items():
        made = ModuleType(module)
        vars(made).update(held)
        monkeypatch.setitem(sys.modules, module, made)
    for owner, name in ((InputProcessor, "process_inputs"), (BeamSearchSequence, "get_prompt")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # which puts it back
    hooks.watch_prompts.__wrapped__()


def asked(plan: dict[str, Any] | None, prompt: dict[str, Any] | int, **extra: Any) -> tuple[Any, str | None]:
    """What becomes of a request: its marks, and its salt."""
    given = {"prompt_token_ids": list(range(prompt))} if isinstance(prompt, int) else prompt
    request = InputProcessor(plan).process_inputs("a", given, Params(**extra))
    return request.sampling_params.extra_args, request.cache_salt


DENSE, LEAST = {"orthorank_dense": True}, {"layers": [2], "min_prompt": 10}


def test_dense_prompts_get_a_mark_and_a_salt() -> None:
    assert asked(LEAST, 10) == (None, None)
    assert asked(LEAST, 9) == (DENSE, dense_salt(None))
    assert asked(LEAST, 12, **DENSE) == (DENSE, dense_salt(None))
    assert asked(LEAST, {"prompt_token_ids": [1], "cache_salt": "a"}) == (DENSE, dense_salt("a"))
    said = {"orthorank_prompt_tokens": 9}
    assert asked(LEAST, 12, **said) == (said | DENSE, dense_salt(None))


def test_beams_say_how_many_tokens_are_their_prompt() -> None:
    """Their parameters are shared, and stay as they are."""
    long, short = (BeamSearchSequence(list(range(count)), [5, 6]).get_prompt() for count in (10, 9))
    said = {"orthorank_prompt_tokens": 10}
    assert asked(LEAST, long) == (said, None)
    assert asked(LEAST, short) == ({"orthorank_prompt_tokens": 9} | DENSE, dense_salt(None))
    params = Params(other=1)
    InputProcessor(LEAST).process_inputs("a", long, params)
    assert params.extra_args == {"other": 1}


@pytest.mark.parametrize("nothing", [{"orthorank_prompt_tokens": None}, {"orthorank_dense": None}], ids=str)
def test_what_is_said_to_be_nothing_is_nothing(nothing: dict[str, Any]) -> None:
    assert asked(LEAST, 12, **nothing) == (nothing, None)
    assert asked(LEAST, 9, **nothing) == (nothing | DENSE, dense_salt(None))


def test_wrong_requests_are_the_clients_fault() -> None:
    with pytest.raises(ValueError, match="orthorank_prompt_tokens is 0; it must be the number"):
        asked(LEAST, 12, orthorank_prompt_tokens=0)
    with pytest.raises(ValueError, match="cache_salt is 'orthorank dense:'; what begins with"):
        asked(LEAST, {"prompt_token_ids": [1], "cache_salt": dense_salt(None)})


def test_an_engine_without_a_plan_beside_one_with() -> None:
    """In one process. Nobody looks at what its requests say."""
    assert asked(None, 3, **DENSE, orthorank_prompt_tokens=0) == (DENSE | {"orthorank_prompt_tokens": 0}, None)
    salted = {"prompt_token_ids": [1], "cache_salt": dense_salt(None)}
    assert asked(None, salted) == (None, dense_salt(None))
