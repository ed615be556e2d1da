"""Threads and one patched model: a call is refused by name, or it is right."""

import copy
import dataclasses
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import orthorank
from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.correction import Correction
from orthorank.hf.status import Total
from orthorank.packed.selection import choose, share
from orthorank.packed.steps import make_step
from orthorank_kernels import rms_norm_select, sparse_query_attention
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import ids_of

PLAN = OrthoRankConfig(layers=[1], keep_ratio=1 / 3)
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
THREADS = 8


def in_threads(work: Callable[[int], bool], accepted: int) -> tuple[int, list[BaseException]]:
    """Let eight threads do ``work`` until so many calls were accepted: how many were wrong, and stray errors."""
    done, wrong, stray = [0] * THREADS, [0] * THREADS, []
    start = threading.Barrier(THREADS)

    def run(number: int) -> None:
        start.wait()
        while sum(done) < accepted and not stray:
            try:
                right = work(number)
            except OrthoRankError as error:
                if "in use by another thread" not in str(error):
                    stray.append(error)
                time.sleep(0.002)  # refused: another one's turn
            except BaseException as error:
                stray.append(error)
            else:
                done[number] += 1
                wrong[number] += not right

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(wrong), stray


@pytest.mark.parametrize("accepted", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_eight_threads_are_refused_or_right(tiny_model: Any, accepted: int) -> None:
    model = tiny_model("llama", **SMALL)
    prompts = [ids_of(1, 6 + i, seed=i) for i in range(THREADS)]
    with apply(model, PLAN):
        with torch.no_grad():
            expected = [model(ids, use_cache=False).logits for ids in prompts]

        @torch.no_grad()
        def call(number: int) -> bool:
            return torch.equal(model(prompts[number], use_cache=False).logits, expected[number])

        assert in_threads(call, accepted) == (0, [])


@pytest.mark.parametrize("corrected", [None, maps([1], hidden=32)], ids=["plain", "corrected"])
def test_threads_that_generate(tiny_model: Any, corrected: Correction | None) -> None:
    """Calls of one thread beside the generation of another, which holds the model from its prompt to its end."""
    model = tiny_model("llama", **SMALL)
    prompts = [ids_of(1, 6 + i, seed=i) for i in range(THREADS)]
    greedy: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with apply(model, dataclasses.replace(PLAN, correction=corrected)), torch.no_grad():
        tokens = [model.generate(ids, **greedy) for ids in prompts]
        logits = [model(ids).logits for ids in prompts]

        @torch.no_grad()
        def call(number: int) -> bool:
            if number % 2:
                return torch.equal(model.generate(prompts[number], **greedy), tokens[number])
            return torch.equal(model(prompts[number]).logits, logits[number])

        assert in_threads(call, 60) == (0, [])


def test_backward_of_one_thread_beside_calls_of_another(tiny_model: Any) -> None:
    """What a recomputation needs was bound in forward: that another call is running then changes nothing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if "__call__" in vars(GradientCheckpointingLayer):  # older transformers: refused, see test_apply.py
        return
    ids, others = ids_of(1, 12), ids_of(1, 30, seed=1)
    gradients = []
    for beside in (False, True):
        model = tiny_model("llama", **SMALL).train()
        model.gradient_checkpointing_enable()
        with apply(model, PLAN):
            loss = model(ids, labels=ids, use_cache=False).loss
            inside, finished = threading.Event(), threading.Event()

            def wait(*_: Any, inside: Any = inside, finished: Any = finished) -> None:
                inside.set()
                finished.wait(60)

            def call(model: Any = model, wait: Any = wait) -> None:
                hook = model.model.layers[1].register_forward_pre_hook(wait)
                with torch.no_grad():
                    model(others, use_cache=False)
                hook.remove()

            other = threading.Thread(target=call)
            if beside:
                other.start()
                assert inside.wait(60)
            loss.backward()
            finished.set()
            if beside:
                other.join()
        gradients.append([weight.grad for weight in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        assert torch.equal(expected, actual)


def refused_elsewhere(work: Callable[[], Any]) -> str:
    """What another thread is told that does ``work``."""
    said: list[str] = []

    def run() -> None:
        try:
            work()
        except OrthoRankError as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return said[0] if said else ""


@torch.no_grad()
def test_what_one_thread_said_holds_for_no_other(tiny_model: Any) -> None:
    model, ids = tiny_model("llama", **SMALL), ids_of(1, 8)
    seen: list[int] = []
    handle = apply(model, PLAN)
    before = model(ids).logits
    contexts = [
        handle.decoding(),
        handle.prefilling(keep_last=3),
        orthorank.context(model, 4),
        handle.watching(lambda layer, positions, call: seen.append(layer)),
    ]
    for context in contexts:
        with context:
            assert "in use by another thread" in refused_elsewhere(lambda: model(ids))
            assert "in use by another thread" in refused_elsewhere(handle.remove)
            assert "in use by another thread" in refused_elsewhere(lambda: model.generate(ids, max_new_tokens=1))
        assert refused_elsewhere(lambda: model(ids)) == ""
    assert seen == []
    assert torch.equal(model(ids).logits, before)
    handle.remove()


@torch.no_grad()
def test_a_model_called_while_it_is_being_called(tiny_model: Any) -> None:
    """By a hook, in the same thread: not a matter of turns, and said otherwise."""
    model, ids = tiny_model("llama", **SMALL), ids_of(1, 8)
    with apply(model, PLAN):
        expected = model(ids).logits
        hook = model.model.layers[0].register_forward_hook(lambda *_: model(ids))
        with pytest.raises(OrthoRankError, match="called while it was being called"):
            model(ids)
        hook.remove()
        assert torch.equal(model(ids).logits, expected)


def contexts_of(model: Any, handle: Any) -> dict[str, Callable[[], Any]]:
    return {
        "decoding": handle.decoding,
        "prefilling": lambda: handle.prefilling(keep_last=4),
        "context": lambda: orthorank.context(model, 3),
        "watching": lambda: handle.watching(lambda *_: pytest.fail("the copy is watched, too")),
    }


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_copies_have_a_lock_of_their_own(tiny_model: Any, clone: Any) -> None:
    """Nor has a copy what was said of the original's calls, or is under way in them: it is the plan's model."""
    model, ids = tiny_model("llama", **SMALL), ids_of(1, 8)
    with apply(model, PLAN) as handle:
        expected = model(ids).logits
        copies = []
        for inside in contexts_of(model, handle).values():
            with inside():
                copies.append(clone(model))
                own = orthorank.handle_of(copies[-1])
                assert own is not None
                assert own.lock is not handle.lock
                assert refused_elsewhere(lambda: copies[-1](ids)) == ""
                assert torch.equal(copies[-1](ids).logits, expected)
        for other in copies:
            assert torch.equal(other(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_copies_made_during_a_call_and_a_generation(tiny_model: Any, clone: Any) -> None:
    model, ids = tiny_model("llama", **SMALL), ids_of(1, 8)
    greedy: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    taken: list[Any] = []

    def take(*_: Any, **__: Any) -> Any:
        parked = [module._forward_pre_hooks.copy() for module in model.model.layers]
        for module in model.model.layers:
            module._forward_pre_hooks.clear()  # a local function cannot be pickled
        taken.append(clone(model))
        for module, hooks in zip(model.model.layers, parked, strict=True):
            module._forward_pre_hooks.update(hooks)
        return torch.zeros(1, dtype=torch.bool)

    def in_a_call(*_: Any) -> None:
        take()

    with apply(model, PLAN):
        expected, tokens = model(ids).logits, model.generate(ids, **greedy)
        hook = model.model.layers[1].register_forward_pre_hook(in_a_call)
        assert torch.equal(model(ids).logits, expected)
        hook.remove()
        assert torch.equal(model.generate(ids, stopping_criteria=[take], **greedy), tokens)
        assert len(taken) == 1 + 3
        for other in taken:
            assert torch.equal(other(ids).logits, expected)
            assert torch.equal(other.generate(ids, **greedy), tokens)


@torch.no_grad()
@pytest.mark.parametrize("inner", [False, True], ids=["the whole model", "its inner part"])
def test_a_plan_is_not_removed_under_way(tiny_model: Any, inner: bool) -> None:
    """Neither by a hook nor inside `generate()`, which would end as another model than it began."""
    model, ids = tiny_model("llama", **SMALL), ids_of(1, 8)
    greedy: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    part = model.model if inner else model
    dense = model(ids).logits
    handle = apply(part, PLAN)
    expected, tokens = model(ids).logits, model.generate(ids, **greedy)

    def remove(*_: Any, **__: Any) -> Any:
        handle.remove()

    with pytest.raises(OrthoRankError, match=r"handle.remove\(\) was called inside generate\(\)"):
        model.generate(ids, stopping_criteria=[remove], **greedy)
    hook = model.model.layers[0].register_forward_hook(remove)
    with pytest.raises(OrthoRankError, match=r"handle.remove\(\) was called while the model is being called"):
        model(ids)
    hook.remove()
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, **greedy), tokens)
    handle.remove()
    assert torch.equal(model(ids).logits, dense)

    def score(given: Any, logits: torch.Tensor) -> torch.Tensor:
        with apply(part, PLAN):  # applied inside, so removed inside
            assert torch.equal(model(ids).logits, expected)
        return logits

    model.generate(ids, logits_processor=[score], **greedy)


@torch.no_grad()
def test_a_generation_of_the_class_changes_nothing_of_another_threads(tiny_model: Any) -> None:
    """It goes past the patch of `generate()`, and is refused before it says which tokens are prompt."""
    from transformers import GenerationMixin

    model, ids, longer = tiny_model("llama", **SMALL), ids_of(1, 8), ids_of(1, 20, seed=1)
    greedy: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with apply(model, PLAN) as handle:
        tokens = model.generate(ids, **greedy)
        said: list[str] = []

        def other(*_: Any, **__: Any) -> Any:
            before = vars(handle.phase).copy()
            said.append(refused_elsewhere(lambda: GenerationMixin.generate(model, longer, **greedy)))
            assert all(vars(handle.phase)[name] is value for name, value in before.items())
            return torch.zeros(1, dtype=torch.bool)

        assert torch.equal(model.generate(ids, stopping_criteria=[other], **greedy), tokens)
        assert len(said) == 3
        assert all("in use by another thread" in text for text in said)


def test_counters_are_read_without_changing_them() -> None:
    total = Total()
    total.add(3)
    total.add(torch.tensor(4))
    before = vars(total) | {"_pending": list(total._pending)}
    assert total.value() == total.value() == 7
    assert vars(total) == before, "a reader that writes would lose what another thread adds"


def test_counters_are_read_with_one_wait_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    original = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda count: waits.append(1) or original(count))
    for counts in (1, 1000, 5000):
        total = Total()
        for count in range(counts):
            total.add(torch.tensor(count, dtype=torch.int32 if count % 2 else torch.int64))
        waits.clear()
        assert total.value() == counts * (counts - 1) // 2
        assert len(waits) == 1
    assert Total().value() == 0
    large = Total()
    for _ in range(3):
        large.add(torch.tensor(2**31 - 1, dtype=torch.int32))
    assert large.value() == 3 * (2**31 - 1)


@torch.no_grad()
def test_ops_and_paged_choices_of_eight_threads() -> None:
    """Nothing below a model is shared between calls, so threads need no turns there."""
    torch.manual_seed(0)
    weight = torch.rand(32)
    states = [torch.randn(1, 20 + i, 32) for i in range(THREADS)]
    plan = OrthoRankConfig(layers=[0], keep_ratio=0.5)

    def results(number: int) -> list[torch.Tensor]:
        tokens = states[number].shape[1]
        picked = rms_norm_select(states[number], weight, 1e-5, tokens // 3)
        heads = picked.normed.view(1, tokens, 2, 16).transpose(1, 2)
        positions = picked.positions
        attended = sparse_query_attention(heads[:, :, positions[0].long()], heads, heads, positions)
        step = make_step(plan, [0, tokens], [0], [tokens], [0], torch.device("cpu"))
        chosen = choose(step, picked.scores[0].clone(), share(step, 0.5))
        return [positions, attended, chosen.rows, chosen.cu_selected]

    expected = [results(i) for i in range(THREADS)]

    def call(number: int) -> bool:
        with torch.no_grad():
            return all(map(torch.equal, results(number), expected[number]))

    assert in_threads(call, 200) == (0, [])
