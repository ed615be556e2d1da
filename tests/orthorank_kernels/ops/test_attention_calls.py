"""sparse_query_attention as torch and a caller see it: memory, gradients, the operator, bad input."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orthorank_kernels import sparse_query_attention
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.pytorch import attention as pytorch
from tests.orthorank_kernels.ops.test_attention import Inputs, inputs, masks, random, written_out
from tests.orthorank_kernels.tools import DEVICE

BACKENDS = ("torch", "triton")
OPS = torch.ops.orthorank_kernels
pytestmark = pytest.mark.filterwarnings("error:.* encountered in:RuntimeWarning")  # the interpreter computed a NaN


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation inside makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and not value._is_view():
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("needs_grad", [False, True])
def test_pytorch_never_holds_selected_by_keys(needs_grad: bool) -> None:
    q, k, v, positions = (x.cpu() for x in inputs(3000, 1500, (2, 1), 16))
    with Largest() as largest:
        sparse_query_attention(q.requires_grad_(needs_grad), k, v, positions, backend="torch")
    assert largest.elements <= pytorch.BLOCK * 3000
    with Largest() as largest:
        sparse_query_attention(q, k, v, positions, window=64, backend="torch")
    assert largest.elements <= pytorch.BLOCK * 1200  # a block's positions span about 400 keys


@pytest.mark.parametrize(("_", "options"), list(masks()), ids=[name for name, _ in masks()])
def test_gradients(_: str, options: dict[str, Any]) -> None:
    tensors = inputs(200, 60, (4, 2), 16, batch=3, tokens=150, fewer=29)
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    out = sparse_query_attention(*leaves, tensors[3], **options)
    weight = random(*out.shape, seed=9).double()
    got = torch.autograd.grad((out * weight).sum(), leaves)
    exact = torch.autograd.grad((written_out(*leaves, tensors[3], **options) * weight).sum(), leaves)
    for name, a, b in zip("qkv", got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"d{name}: {text}")


def arguments(tensors: Inputs, **options: Any) -> tuple[Any, ...]:
    """The operator's arguments."""
    defaults = {
        "scale": 0.2,
        "window": None,
        "starts": None,
        "query_offset": 0,
        "softcap": None,
        "sinks": None,
        "return_lse": False,
    }
    return (*tensors, *{**defaults, **options}.values())


@pytest.mark.parametrize("options", [{}, {"window": 9, "query_offset": 3}], ids=str)
def test_opcheck(options: dict[str, Any]) -> None:
    args = arguments(inputs(40, 12, (4, 2), batch=2, fewer=3), **options)
    torch.library.opcheck(OPS.sparse_query_attention.default, args)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_compiles_into_one_graph(needs_grad: bool) -> None:
    q, k, v, positions = inputs(60, 20, (4, 2), batch=2, fewer=5)
    starts = torch.tensor([0, 7], dtype=torch.int32, device=DEVICE)
    q.requires_grad_(needs_grad)

    def attend(q: torch.Tensor, window: int, offset: int) -> torch.Tensor:
        out = sparse_query_attention(q, k, v, positions, window=window, starts=starts, query_offset=offset)
        return out.transpose(1, 2).flatten(2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for window, offset in ((30, 0), (9, 0), (9, 4)):
        torch.testing.assert_close(compiled(q, window, offset), attend(q, window, offset))
    if needs_grad:
        gradients = [torch.autograd.grad(f(q, 9, 4).square().sum(), q)[0] for f in (compiled, attend)]
        torch.testing.assert_close(*gradients)


def bad_inputs() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    q, k, v, positions = inputs(20, 6, (4, 2))
    yield "rank", {"q": q[0]}, ValueError, r"q has shape \[4, 6, 32\]; it must be \[batch, heads"
    yield "list", {"positions": [[0]]}, TypeError, "positions is a list"
    yield "heads", {"q": q[:, :3]}, ValueError, "q has 3 heads and k has 2"
    yield "dtype", {"k": k.half()}, TypeError, "k has dtype float16 and q float32"
    yield "integers", {"q": q.int()}, TypeError, "q has dtype int32; it may be"
    yield "keys and values", {"v": v[:, :, :9]}, ValueError, "v has shape"
    yield "head_dim", {"q": q[..., :16]}, ValueError, r"k has shape .* q asks for \[1, 2, 20, 16\]"
    yield "stride", {"k": k.mT.contiguous().mT}, ValueError, r"k has strides .* k.contiguous\(\)"
    yield "long positions", {"positions": positions.long()}, TypeError, "positions has dtype int64; it may be int32"
    yield "selected", {"positions": positions[:, :5]}, ValueError, r"positions has shape \[1, 5\]"
    yield "starts", {"starts": torch.zeros(2, dtype=torch.int32, device=DEVICE)}, ValueError, "starts has shape"
    yield "window of 0", {"window": 0}, ValueError, "window is 0; it must be an int of at least 1"
    yield "window", {"window": 2.0}, TypeError, "window is 2.0; it must be an int"
    yield "offset", {"query_offset": None}, TypeError, "query_offset is None; it must be an int"
    yield "scale of 0", {"scale": 0.0}, ValueError, "scale is 0.0; it must be a number of at least 1e-10"
    yield "device", {"v": v.to("meta")}, ValueError, "v is on meta"
    yield "backend", {"backend": "cuda"}, ValueError, "backend is 'cuda'; it may be one of 'auto'"


@pytest.mark.parametrize(("_", "changes", "error", "words"), list(bad_inputs()), ids=[case[0] for case in bad_inputs()])
def test_bad_inputs(_: str, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    q, k, v, positions = inputs(20, 6, (4, 2))
    with pytest.raises(error, match=words):
        sparse_query_attention(**{"q": q, "k": k, "v": v, "positions": positions, **changes})


def test_what_the_kernel_does_not_take() -> None:
    with pytest.raises(ValueError, match="head_dim 257; the Triton kernel takes at most 256"):
        sparse_query_attention(*inputs(4, 2, dim=257), backend="triton")
    with pytest.raises(TypeError, match=r"float64; .* pass backend=\"torch\""):
        sparse_query_attention(*inputs(4, 2, dtype=torch.float64), backend="triton")
    q, k, v, positions = inputs(4, 2)
    with pytest.raises(BackendError, match="requires grad"):
        sparse_query_attention(q.requires_grad_(), k, v, positions, backend="triton")
