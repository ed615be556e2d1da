"""Weights that change after they were first seen: the sinks' states are computed anew, removed layers stay removed."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import EMBEDDING
from tests.vllm.engines import ask, check, engine, expect, prompts, unlike

pytestmark = pytest.mark.vllm
PLAN: dict[str, Any] = {
    "layers": [1, 2, 3],
    "keep_ratio": 1 / 3,
    "keep_ratios": {"1": 0.0},
    "select": "window",
    "select_window": 32,
}
ASKED = [prompts([90], seed=1)[0], prompts([40], seed=2, first=9)[0]]


GONE = "model.layers.1.mlp.down_proj.weight"


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def test_weights_that_change(untied: dict[str, Path]) -> None:
    """One engine, every way to change its weights that a CPU has; each prompt's first token was seen before."""
    wanted = {name: expect(folder, PLAN, ASKED) for name, folder in untied.items()}
    first, second = (weights_of(untied[name]) for name in ("first", "second"))
    with engine(untied["first"], PLAN) as llm:

        def reload(**named: Any) -> None:
            llm.collective_rpc("reload_weights", kwargs=named)

        def checked(name: str) -> None:
            llm.reset_prefix_cache()
            check(ask(llm, ASKED), wanted[name])

        def copy(model: Any, weights: dict[str, Any]) -> None:
            model.model.embed_tokens.weight.data.copy_(weights[EMBEDDING])

        checked("first")
        reload(weights_path=str(untied["second"]))
        checked("second")
        reload(weights_iterator=iter(first.items()))
        checked("first")
        llm.apply_model(lambda model: model.load_weights([(EMBEDDING, second[EMBEDDING]), (GONE, second[GONE])]))
        checked("mixed")
        kernel = iter([(EMBEDDING, first[EMBEDDING]), (GONE, first[GONE])])
        reload(weights_iterator=kernel, is_checkpoint_format=False)
        checked("first")
        kernel = iter([(EMBEDDING, second[EMBEDDING]), (GONE, second[GONE])])
        llm.collective_rpc("reload_weights", args=(kernel,), kwargs={"is_checkpoint_format": False})
        checked("mixed")
        llm.collective_rpc(
            "reload_weights", args=(iter([(EMBEDDING, first[EMBEDDING]), (GONE, first[GONE])]), None, False)
        )
        checked("first")
        llm.apply_model(lambda model: copy(model, second))
        llm.reset_prefix_cache()
        unlike(ask(llm, ASKED), wanted["mixed"])  # past every entry: somebody has to say so
        assert llm.collective_rpc("orthorank_weights_changed") == [True]
        checked("mixed")
    unlike(wanted["first"], wanted["second"])
    unlike(wanted["first"], wanted["mixed"])


def test_weight_transfers_are_watched() -> None:
    """They need GPUs: of a transfer it is only known that every method of the worker is watched."""
    from vllm.v1.worker.gpu_worker import Worker

    from orthorank.serving.vllm import hooks

    hooks.watch_weights()
    for name in hooks.CHANGE_WEIGHTS:
        assert getattr(Worker, name).__wrapped__.__qualname__ == f"Worker.{name}"
