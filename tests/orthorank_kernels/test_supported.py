"""`is_supported` says what happens: every answer is compared with a call."""

from typing import Any

import pytest
import torch

from orthorank_kernels import dispatch, is_supported
from orthorank_kernels.support import OPS
from tests.orthorank_kernels.every_op import NOT_OPS, Call, Numbers, Shapes, Sizes, calls
from tests.orthorank_kernels.fake_gpu import fake_gpus

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.float8_e4m3fn)
SIZES: list[dict[str, int]] = [
    {},
    {"head_dim": 32},
    {"head_dim": 256},
    {"head_dim": 258},
    {"heads": 4, "kv_heads": 4},
    {"heads": 4, "kv_heads": 3},
    {"heads": 6, "kv_heads": 1},
]


def first_call(op: str, new: Shapes, sizes: Sizes) -> Call:
    call = calls(new, sizes)[op]
    return call.where(lambda x: x.to(sizes.dtype), 0) if op == "select_tokens" else call


def refusal(op: str, device: str, sizes: Sizes, backend: str) -> str | None:
    """What the op says of such arguments, or None if it takes them."""
    new = Numbers() if device == "cpu" else Shapes(device)
    try:
        first_call(op, new, sizes)(backend=backend)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def same(answer: tuple[bool, str], said: str | None, asked: dict[str, Any]) -> None:
    supported, reason = answer
    assert supported == (said is None), f"{asked}: {reason}, but the op says: {said}"
    assert reason
    if said:
        assert any(word in said for word in ("it may be", "the Triton kernel takes", "divide")), said


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_answers_are_what_happens(op: str, dtype: torch.dtype) -> None:
    for changes in SIZES:
        if any(name not in OPS[op].asks for name in changes):
            continue
        asked: dict[str, Any] = {"dtype": dtype, **changes}
        sizes = Sizes(**asked)
        same(is_supported(op, device="cpu", **asked), refusal(op, "cpu", sizes, "auto"), asked)
        with fake_gpus():
            same(is_supported(op, device="cuda:1", **asked), refusal(op, "cuda:1", sizes, "triton"), asked)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.uint8], ids=str)
def test_dtypes_of_caches(kv_dtype: torch.dtype) -> None:
    op, asked = "sparse_query_attention_paged", {"dtype": torch.bfloat16, "kv_dtype": kv_dtype, "block_size": 48}
    for device, backend in (("cpu", "auto"), ("cuda:1", "triton")):
        with fake_gpus("sm_80"):
            call = calls(Shapes(device), Sizes(dtype=torch.bfloat16))[op].where(lambda x: x.to(kv_dtype), 1, 2)
            said = None
            try:
                call(backend=backend)
            except TypeError as error:
                said = str(error)
            supported, reason = is_supported(op, device=device, **asked)
        assert supported == (said is None) == (kv_dtype.itemsize == 1 and kv_dtype.is_floating_point)
        assert supported or "it may be" in reason


def test_every_public_op_has_an_answer() -> None:
    import orthorank_kernels

    assert set(OPS) == set(orthorank_kernels.__all__) - NOT_OPS


def test_reasons_name_what_is_in_the_way() -> None:
    def why(op: str, device: str = "cpu", dtype: torch.dtype = torch.float16, **asked: Any) -> str:
        supported, reason = is_supported(op, device=device, dtype=dtype, **asked)
        assert not supported
        return reason

    assert "dtype is float64; it may be float32" in why("rms_norm_score", dtype=torch.float64)
    assert "kv_heads is 3 and heads 8" in why("sparse_query_attention", heads=8, kv_heads=3)
    assert "head_dim is 0; it must be at least 1" in why("sparse_query_attention", head_dim=0)
    assert "registered for CPU and CUDA" in why("gather_rows", "mps")
    with fake_gpus():
        assert "at most 256" in why("sparse_query_attention", "cuda", head_dim=320)


def test_without_a_gpu_the_answer_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    supported, reason = is_supported("gather_rows", device="cuda:0", dtype=torch.float16)
    assert not supported
    assert "PyTorch sees no GPU" in reason
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert "Triton is not installed" in is_supported("gather_rows", device="cuda", dtype=torch.float16)[1]


@pytest.mark.parametrize(
    ("op", "asked", "error", "sentence"),
    [
        ("gather", {}, ValueError, "op is 'gather'; it may be one of rms_norm_score, "),
        ("gather_rows", {"head_dim": 64}, ValueError, "head_dim is 64, and gather_rows has no head_dim"),
        ("sparse_query_attention", {"head_dim": 6.5}, TypeError, "head_dim is 6.5; it must be an int"),
        ("sparse_query_attention", {"heads": True}, TypeError, "heads is True; it must be an int"),
        ("gather_rows", {"dtype": "bfloat16"}, TypeError, "dtype is 'bfloat16'; it must be a torch dtype"),
    ],
)
def test_questions_that_make_no_sense(op: str, asked: dict, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        is_supported(op, **{"device": "cpu", "dtype": torch.float32, **asked})
