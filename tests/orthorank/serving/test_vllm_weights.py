"""`orthorank.serving.vllm.hooks._then_forgets`: what a worker gets when its weights change, and what is left."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from orthorank.serving.vllm import hooks

GIVEN = [("model.layers.1.mlp.up_proj.weight", 1), ("model.layers.2.mlp.up_proj.weight", 2), ("model.norm.weight", 3)]
KEPT = GIVEN[1:]


class Runner:
    """With vLLM's own signature."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []

    def reload_weights(
        self,
        weights_iterator: Iterable[Any] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        self.loaded = [list(weights_iterator or ()), weights_path, is_checkpoint_format]


class Bank:
    def __init__(self) -> None:
        self.forgot = 0

    def forget(self) -> None:
        self.forgot += 1


class Worker:
    """As vLLM's: it hands on whatever it is given."""

    def __init__(self, removed: tuple[int, ...] = (1,), normed: tuple[int, ...] = ()) -> None:
        self.model_runner = Runner()
        self.model = SimpleNamespace(orthorank=SimpleNamespace(removed=removed, normed=normed, bank=Bank()))

    def get_model(self) -> Any:
        return self.model

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        self.model_runner.reload_weights(*args, **kwargs)

    def update_weights(self, update_info: Any) -> None:
        raise RuntimeError("the trainer is gone")


reload = hooks._then_forgets(Worker.reload_weights)


@pytest.mark.parametrize(
    ("args", "kwargs", "rest"),
    [
        ((), {"weights_iterator": iter(GIVEN)}, [None, True]),
        ((iter(GIVEN),), {}, [None, True]),
        ((iter(GIVEN),), {"is_checkpoint_format": False}, [None, False]),
        ((iter(GIVEN), None, False), {}, [None, False]),
        ((), {"is_checkpoint_format": False, "weights_iterator": iter(GIVEN)}, [None, False]),
    ],
    ids=["named", "placed", "placed, and a name", "all placed", "all named"],
)
def test_weights_of_removed_layers_are_passed_over(args: Any, kwargs: Any, rest: list[Any]) -> None:
    worker = Worker()
    reload(worker, *args, **kwargs)
    assert worker.model_runner.loaded == [KEPT, *rest]
    assert worker.model.orthorank.bank.forgot == 1


def test_the_norm_of_a_corrected_removed_layer_is_not_passed_over() -> None:
    norm, worker = ("model.layers.1.input_layernorm.weight", 4), Worker(normed=(1,))
    reload(worker, iter([*GIVEN, norm]))
    assert worker.model_runner.loaded[0] == [*KEPT, norm]


def test_weights_from_a_path_and_without_removed_layers_are_as_given() -> None:
    worker = Worker()
    reload(worker, None, "folder")
    assert worker.model_runner.loaded == [[], "folder", True]
    worker = Worker(removed=())
    reload(worker, iter(GIVEN))
    assert worker.model_runner.loaded == [GIVEN, None, True]


def test_wrong_arguments_are_what_the_worker_says_they_are() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight_path'"):
        reload(Worker(), weight_path="folder")
    with pytest.raises(TypeError, match="multiple values for argument 'weights_iterator'"):
        reload(Worker(), iter(GIVEN), weights_iterator=iter(GIVEN))
    with pytest.raises(TypeError, match="takes from 1 to 4 positional arguments but 5 were given"):
        reload(Worker(), iter(GIVEN), None, True, 4)


def test_the_error_of_a_change_is_the_one_that_is_raised() -> None:
    """The weights may be others in part, so the sinks are forgotten; that this fails too is a note."""
    update = hooks._then_forgets(Worker.update_weights)
    worker = Worker()
    with pytest.raises(RuntimeError, match="the trainer is gone"):
        update(worker, {})
    assert worker.model.orthorank.bank.forgot == 1
    worker.model.orthorank.bank = None
    with pytest.raises(RuntimeError, match="the trainer is gone") as caught:
        update(worker, {})
    assert "the sinks' states could not be forgotten: AttributeError" in caught.value.__notes__[0]


def test_a_worker_without_a_model_yet() -> None:
    worker = Worker()
    worker.model_runner = None  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'reload_weights'"):
        reload(worker)
