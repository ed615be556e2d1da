"""What a call must not do in silence: overlapping memory, pages that are not there, devices that nobody has."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import orthorank_kernels as ok
from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch, support
from orthorank_kernels import op as _library
from orthorank_kernels.dispatch import BackendError, interpreting
from tests.orthorank_kernels.every_op import IN_PLACE, Numbers, Sizes, calls, flat

ROOT = Path(__file__).resolve().parents[3]
SIZES = Sizes(batch=2, tokens=9, selected=4, hidden=8, heads=2, kv_heads=1, head_dim=4)
FUNCTIONAL = [name for name, call in calls(Numbers(), SIZES).items() if call.op not in IN_PLACE]


BUFFER = torch.zeros(24, 8)
PAIRS: dict[str, tuple[torch.Tensor, torch.Tensor, bool]] = {
    "the same": (BUFFER, BUFFER, True),
    "other memory": (BUFFER, BUFFER.clone(), False),
    "one after the other": (BUFFER[:12], BUFFER[12:], False),
    "one row of both": (BUFFER[:13], BUFFER[12:], True),
    "halves of rows": (BUFFER[:, :4], BUFFER[:, 4:], False),
    "halves of rows that meet": (BUFFER[:, :5], BUFFER[:, 4:], True),
    "every other row": (BUFFER[::2], BUFFER[1::2], False),
    "a row between rows": (BUFFER[3], BUFFER[::2], False),
    "a row among rows": (BUFFER[4], BUFFER[::2], True),
    "heads of a projection": (BUFFER.view(24, 2, 4)[:, 0].T, BUFFER.view(24, 2, 4)[:, 1], False),
    "nothing": (BUFFER[:0], BUFFER, False),
    "an expanded row": (BUFFER[:1].expand(5, 8), BUFFER[0], True),
    "other dtypes": (BUFFER.view(torch.int32), BUFFER, True),
}


@pytest.mark.parametrize(("a", "b", "share"), PAIRS.values(), ids=PAIRS)
def test_memory_that_is_shared_is_seen(a: torch.Tensor, b: torch.Tensor, share: bool) -> None:
    for one, other in ((a, b), (b, a)):
        if share:
            with pytest.raises(ValueError, match=r"out shares memory with x, which is read.*or x\.clone\(\)"):
                _checks.apart("out", one, "x", other)
        else:
            _checks.apart("out", one, "x", other)


def shaped(result: Any, memory: list[torch.Tensor]) -> Any:
    """``memory`` as ``out=`` takes it, for a call that returned ``result``."""
    if isinstance(result, torch.Tensor):
        return memory.pop(0)
    return tuple(None if part is None else memory.pop(0) for part in result)


def laid_out(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The beginning of ``buffer``, in the shape and the order in memory of ``like``."""
    start = buffer[: like.numel()]
    if like.is_contiguous():
        return start.view(like.shape)
    return start.view(like.transpose(1, 2).shape).transpose(1, 2)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_an_output_over_an_input_is_refused_and_both_are_named(name: str) -> None:
    call = calls(Numbers(), SIZES)[name]
    result = call()
    results = flat(result)
    for i, written in enumerate(results):
        found = [(at, x) for at, x in call.tensors().items() if x.dtype == written.dtype]
        if not found:  # scores alone went in, and only indices come out
            assert name == "select_tokens"
            continue
        place, x = found[0]
        buffer = torch.zeros(2 * max(x.numel(), written.numel()), dtype=x.dtype)
        moved = buffer[1 : 1 + x.numel()].view(x.shape).copy_(x)  # not the same view, which some ops take
        memory = [laid_out(buffer, r) if j == i else torch.empty_like(r) for j, r in enumerate(results)]
        with pytest.raises(ValueError, match=r"out(\[\d\])? shares memory with \w+"):
            call.where(lambda _, moved=moved: moved, place)(out=shaped(result, memory))


def test_two_outputs_in_one_memory_are_refused() -> None:
    x, positions, rows, weight = calls(Numbers(), SIZES)["gather_add_rms_norm"].args[:4]
    out = torch.empty_like(rows)
    with pytest.raises(ValueError, match=r"out\[1\] shares memory with out\[0\]"):
        ok.gather_add_rms_norm(x, positions, rows, weight, 1e-6, out=(out, out))


@pytest.mark.parametrize("name", ["scatter_rows_", "scatter_rows_, packed", "scatter_add_rows_"])
def test_a_scatter_into_its_own_rows_is_refused(name: str) -> None:
    call = calls(Numbers(), SIZES)[name]
    inside = call.args[0][..., : SIZES.selected, :]
    for place, word in ((2, "rows"), (3, "residual")):
        if place < len(call.args):
            with pytest.raises(ValueError, match=f"out shares memory with {word}, which is read"):
                call.where(lambda _: inside, place)()


def test_what_may_be_an_output_is_taken_as_the_same_view_alone() -> None:
    x, cos, sin, positions = calls(Numbers(), SIZES)["apply_rotary_at"].args
    expected = ok.apply_rotary_at(x, cos, sin, positions)
    assert torch.equal(ok.apply_rotary_at(x, cos, sin, positions, out=x), expected)
    buffer = torch.zeros(x.numel() + 4)
    shifted = buffer[4:].view(x.shape)
    with pytest.raises(ValueError, match="out shares memory with x"):
        ok.apply_rotary_at(buffer[:-4].view(x.shape), cos, sin, positions, out=shifted)


@pytest.mark.skipif(not interpreting(), reason="calls the launcher, which looks at no value")
@pytest.mark.parametrize("block_size", [4, 16, 32])
def test_pages_that_are_not_there_are_the_last_one(block_size: int) -> None:
    """On a GPU nobody looks at the numbers in a table: none of them makes a launch read outside the cache."""
    launch = _library.launcher("attention.sparse_query_attention_paged")
    new, length = Numbers(seed=4), 40
    pages, width = 5, -(-length // block_size)
    q, k, v = new.floats(6, 2, 16), *(new.floats(pages, block_size, 1, 16) for _ in range(2))
    positions, cu_selected = new.ints(3, 20, 39, 0, 8, 39), new.ints(0, 3, 6)

    def attended(table: list[list[int]], seq_lens: list[int], rows: list[int] | None) -> torch.Tensor:
        where = torch.tensor(table, dtype=torch.int32), new.ints(*seq_lens)
        rest = (None, 0.25, None, None, None, None, None, False)
        return launch(q, k, v, positions, cu_selected, *where, None if rows is None else new.ints(*rows), *rest)[0]

    good = [[4] * width, [2] + [4] * (width - 1)]
    wild = [[2**31 - 1] * width, [2] + [-7] * (width - 1)]
    assert torch.equal(attended(wild, [length] * 2, None), attended(good, [length] * 2, None))
    assert torch.equal(attended(wild, [length, 10**9], [-3, 99]), attended(good, [length, width * block_size], [0, 1]))


def test_sinks_without_a_number_are_refused() -> None:
    call = calls(Numbers(), SIZES)["sparse_query_attention, cap, sinks, lse"]
    for wrong in (float("inf"), float("-inf"), float("nan")):
        with pytest.raises(ValueError, match="sinks holds a logit that is not finite; each must be a finite number"):
            call.where(lambda x, wrong=wrong: torch.full_like(x, wrong), "sinks")()


def test_other_integers_are_refused_with_the_cure() -> None:
    call = calls(Numbers(), SIZES)["sparse_query_attention_paged, everything"]
    for place, name in ((3, "positions"), (4, "cu_selected"), (5, "block_table"), (6, "seq_lens")):
        with pytest.raises(TypeError, match=rf"{name} has dtype int64; it may be int32: pass {name}\.int\(\)"):
            call.where(torch.Tensor.long, place)()
    with pytest.raises(TypeError, match=r"table_rows has dtype int64; it may be int32: pass table_rows\.int\(\)"):
        call.where(torch.Tensor.long, "table_rows")()


DEVICES: list[tuple[Any, type[Exception], str]] = [
    ("gpu", ValueError, "device is 'gpu'; it must be a torch.device or a string such as 'cuda', 'cuda:1' or 'cpu'"),
    ("cuda:-1", ValueError, "device is 'cuda:-1'"),
    ("", ValueError, "device is ''"),
    (0, TypeError, "device is 0; it must be"),
    (None, TypeError, "device is None"),
]
QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "is_supported": lambda device: ok.is_supported("gather_rows", device=device, dtype=torch.float32),
    "warmup": lambda device: ok.warmup(
        dtype=torch.float32, hidden=8, heads=1, kv_heads=1, head_dim=8, ops=[], tokens=[4], device=device
    ),
    "describe": dispatch.describe,
}


@pytest.mark.parametrize(("device", "error", "sentence"), DEVICES, ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)
def test_odd_devices(ask: Callable[[Any], Any], device: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        ask(device)
    assert str(caught.value).startswith(sentence)


def test_warmup_without_the_gpu_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, count, said in (("cuda:1", 1, "1 GPUs here; name one of them, or"), ("cuda", 0, "no GPU here;")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(BackendError, match=rf"warmup on device {device}: PyTorch .* sees {said} call warmup where"):
            QUESTIONS["warmup"](device)


def test_gpus_before_sm_80_are_said_to_be_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, guessed in (((7, 0), True), ((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        supported, reason = ok.is_supported("gather_rows", device="cuda", dtype=torch.float16)
        assert supported
        assert ("its launch settings are a guess" in reason) == guessed
    assert support._warning(torch.device("cuda")) == ""


@pytest.mark.skipif(not interpreting(), reason="a kernel that could run")
def test_vmap_over_a_kernel_says_what_would_work() -> None:
    x, positions = calls(Numbers(), SIZES)["gather_rows"].args
    with pytest.raises(BackendError, match=r"a tensor inside torch.vmap or torch.func.*use backend=\"auto\""):
        torch.vmap(lambda y: ok.gather_rows(y, positions, backend="triton"))(torch.stack([x, x]))


def test_a_full_disk_gives_a_sentence_and_no_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "orthorank_kernels", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "orthorank-kernels: the file system says of the output: No space left on device\n"
