"""sparse_query_attention: soft-capping, sink logits, the log-sum-exp and out=, against a loop over queries."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orthorank_kernels import sparse_query_attention
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.pytorch import attention as pytorch
from tests.orthorank_kernels.attention_cases import assert_right, integers, random, stated
from tests.orthorank_kernels.tools import DEVICE, DTYPES, poisoned_outputs

BACKENDS = ("torch", "triton")
OPS = torch.ops.orthorank_kernels
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(
    heads: tuple[int, int] = (4, 2), dim: int = 32, dtype: torch.dtype = torch.float32, keys: int = 90, most: int = 24
) -> Inputs:
    """Two rows, the second with fewer selected tokens."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.full((2, most), -1)
    for row, count in ((0, most), (1, most // 3)):
        positions[row, :count] = torch.randperm(keys, generator=generator)[:count].sort().values
    q = random(2, heads[0], most, dim, dtype=dtype, seed=1)
    k, v = (random(2, heads[1], keys, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    return q, k, v, integers(positions)


def stated_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    query_offset: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float64, device=q.device)
    for b, i in itertools.product(range(q.shape[0]), range(q.shape[2])):
        if positions[b, i] >= 0:
            at, start = int(positions[b, i]) + query_offset, 0 if starts is None else int(starts[b])
            keys, values = k[b].transpose(0, 1), v[b].transpose(0, 1)
            out[b, :, i], lse[b, :, i] = stated(q[b, :, i], keys, values, at, start=start, **options)
    return out, lse


def check(tensors: Inputs, backend: str, **options: Any) -> torch.Tensor:
    def run(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        with poisoned_outputs():
            out, lse = sparse_query_attention(*tensors, return_lse=True, backend=backend, **options)
        assert out.transpose(1, 2).is_contiguous()
        assert lse.is_contiguous()
        return out, lse

    return assert_right(run, stated_batch(*tensors, **options), tensors[0].dtype, backend)


def sinks(heads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Some that change nothing, some that take everything."""
    return random(heads, seed=5).mul(4).to(dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "lse": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": sinks(4)},
    "sinks in half precision": {"sinks": sinks(4, torch.bfloat16)},
    "softcap, sinks and scale": {"softcap": 20.0, "sinks": sinks(4), "scale": 2.0},
    "window": {"window": 7, "softcap": 1.5, "sinks": sinks(4)},
    "left padding": {"starts": integers([0, 50]), "softcap": 1.5, "sinks": sinks(4)},
    "queries before all keys": {"query_offset": -45, "sinks": sinks(4)},
    "queries past all keys": {"query_offset": 45, "window": 60, "softcap": 1.5},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], backend: str) -> None:
    tensors = inputs()
    out = check(tensors, backend, **options)
    alone = sparse_query_attention(*tensors, backend=backend, **options)
    torch.testing.assert_close(alone, out, rtol=1e-5, atol=1e-5)  # without the lse, torch's fused attention


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 runs in PyTorch")
    check(inputs(dtype=dtype), backend, softcap=2.0, sinks=sinks(4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim: int, backend: str) -> None:
    check(inputs((2, 1), dim, most=12), backend, softcap=2.0, sinks=sinks(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (16, 1), (7, 1)], ids=str)
def test_groups_of_query_heads(heads: tuple[int, int], backend: str) -> None:
    check(inputs(heads, most=12), backend, softcap=2.0, sinks=sinks(heads[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_keys_gives_nothing_even_with_a_sink(backend: str) -> None:
    q, k, v, positions = inputs()
    for keys in (90, 0):
        positions[1] = -1
        out, lse = sparse_query_attention(
            q, k[:, :, :keys], v[:, :, :keys], positions, sinks=sinks(4), return_lse=True, backend=backend
        )
        blind = slice(1, 2) if keys else slice(None)
        assert (out[blind] == 0).all()
        assert (lse[blind] == float("-inf")).all()
    out, lse = sparse_query_attention(q[:, :, :0], k, v, positions[:, :0], return_lse=True, backend=backend)
    assert out.shape == (2, 4, 0, 32)
    assert lse.shape == (2, 4, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_fault_is_seen(splits: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query of NaN gives NaN, whether or not its keys are split; the others give what they gave."""
    from orthorank_kernels.triton import configs

    monkeypatch.setattr(configs, "splits", lambda *_: splits)
    q, k, v, positions = inputs(most=3)
    sound = sparse_query_attention(q, k, v, positions, backend=backend)
    q[0, 1, 2] = float("nan")
    out, lse = sparse_query_attention(q, k, v, positions, return_lse=True, backend=backend)
    assert out[0, 1, 2].isnan().all()
    assert lse[0, 1, 2].isnan()
    assert torch.equal(out.isnan().any(-1), lse.isnan())
    torch.testing.assert_close(out[~lse.isnan()], sound[~lse.isnan()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_scale_lets_a_query_see_later_keys(backend: str) -> None:
    q, k, v, positions = inputs()
    check((q, k, v, positions), backend, scale=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_equals_one_more_key_without_a_value(backend: str) -> None:
    q, k, v, positions = inputs((2, 2))
    zero = torch.zeros(2, 2, 1, 32, device=DEVICE)
    options = {"return_lse": True, "backend": backend}
    ours = sparse_query_attention(q, k, v, positions, sinks=torch.zeros(2, device=DEVICE), **options)
    shifted = torch.where(positions < 0, -1, positions + 1)
    theirs = sparse_query_attention(q, torch.cat([zero, k], 2), torch.cat([zero, v], 2), shifted, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_softcap_and_a_low_sink_change_nothing(backend: str) -> None:
    tensors = inputs()
    plain = sparse_query_attention(*tensors, return_lse=True, backend=backend)
    nearly = sparse_query_attention(
        *tensors, softcap=1e3, sinks=torch.full((4,), -1e4, device=DEVICE), return_lse=True, backend=backend
    )
    for a, b in zip(plain, nearly, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_of_the_keys_merge_by_their_lse(backend: str) -> None:
    q, k, v, positions = inputs()
    whole, lse = sparse_query_attention(q, k, v, positions, return_lse=True, backend=backend)
    parts = [
        sparse_query_attention(q, k[:, :, :31], v[:, :, :31], positions, return_lse=True, backend=backend),
        sparse_query_attention(
            q, k[:, :, 31:], v[:, :, 31:], positions, query_offset=-31, return_lse=True, backend=backend
        ),
    ]
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    torch.testing.assert_close(merged, lse, rtol=1e-5, atol=3e-6)
    weights = [(part - merged).exp().nan_to_num(0.0)[..., None] for _, part in parts]
    total = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=3e-6)


def outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, selected, dim = q.shape
    out = q.new_full((batch, selected, heads, dim), float("nan")).transpose(1, 2)
    return out, torch.full((batch, heads, selected), float("nan"), device=q.device)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_written_and_returned(dtype: torch.dtype, backend: str) -> None:
    tensors = inputs(dtype=dtype)
    options = {"softcap": 2.0, "sinks": sinks(4), "backend": backend}
    expected, expected_lse = sparse_query_attention(*tensors, return_lse=True, **options)
    out, lse = outputs(tensors[0])
    got = sparse_query_attention(*tensors, return_lse=True, out=(out, lse), **options)
    assert got[0] is out
    assert got[1] is lse
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    out, _ = outputs(tensors[0])
    assert sparse_query_attention(*tensors, out=out, backend=backend) is out
    assert torch.equal(out, sparse_query_attention(*tensors, backend=backend))


def test_out_has_no_gradient() -> None:
    q, k, v, positions = inputs()
    with pytest.raises(BackendError, match=r"out= got an input that requires grad"):
        sparse_query_attention(q.requires_grad_(), k, v, positions, out=outputs(q)[0])
    with torch.no_grad():
        sparse_query_attention(q, k, v, positions, out=outputs(q)[0])


@pytest.mark.parametrize("name", ["softcap", "sinks", "window", "left padding"])
def test_gradients(name: str) -> None:
    q, k, v, positions = inputs(keys=40, most=15)
    options = dict(OPTIONS[name])
    leaves = [x.double().requires_grad_() for x in (q, k, v, sinks(4))]
    weights = random(2, 4, 15, 32, seed=9).double(), random(2, 4, 15, seed=10).double()
    seen = positions[:, None] >= 0

    def gradients(attend: Any) -> tuple[torch.Tensor, ...]:
        if "sinks" in options:
            options["sinks"] = leaves[3]
        out, lse = attend(*leaves[:3], positions, **options)
        visible = (lse > float("-inf")) & seen
        loss = (out * weights[0]).sum() + torch.where(visible, lse.masked_fill(~visible, 0) * weights[1], 0).sum()
        return torch.autograd.grad(loss, leaves if "sinks" in options else leaves[:3])

    ours = gradients(lambda *args, **kwargs: sparse_query_attention(*args, return_lse=True, **kwargs))
    for name, a, b in zip(("q", "k", "v", "sinks"), ours, gradients(stated_batch), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"d{name}: {text}")


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation inside makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and not value._is_view():
                self.elements = max(self.elements, value.numel())
        return result


def test_pytorch_holds_a_block_of_scores() -> None:
    tensors = tuple(x.cpu() for x in inputs((8, 2), 16, keys=2000, most=1500))
    with Largest() as largest:
        sparse_query_attention(*tensors, softcap=2.0, return_lse=True, backend="torch")
    assert largest.elements <= pytorch.ROWS * 2000


def arguments(**options: Any) -> tuple[Any, ...]:
    defaults = {"scale": 0.2, "window": None, "starts": None, "query_offset": 0}
    added = {"softcap": None, "sinks": None, "return_lse": False}
    return (*inputs(keys=30, most=9), *{**defaults, **added, **options}.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"return_lse": True}, {"softcap": 2.0, "sinks": sinks(4), "return_lse": True, "window": 9, "query_offset": 3}],
    ids=["plain", "lse", "everything"],
)
def test_opcheck(options: dict[str, Any]) -> None:
    args = arguments(**options)
    torch.library.opcheck(OPS.sparse_query_attention.default, args)
    out, lse = outputs(args[0])
    lse = lse if options.get("return_lse") else None
    torch.library.opcheck(OPS.sparse_query_attention_out.default, args, {"attended": out, "lse": lse})


@pytest.mark.parametrize(
    ("needs_grad", "every"),
    [(False, True), *(pytest.param(True, every, marks=pytest.mark.slow) for every in (False, True))],
)
def test_compiles_into_one_graph(needs_grad: bool, every: bool) -> None:
    q, k, v, positions = inputs()
    q.requires_grad_(needs_grad)
    logits = sinks(4)

    def attend(q: torch.Tensor, softcap: float) -> torch.Tensor:
        out, lse = sparse_query_attention(q, k, v, positions, softcap=softcap, sinks=logits, return_lse=True)
        return out * torch.where(positions[:, None] < 0, 0.0, lse.masked_fill(positions[:, None] < 0, 0))[..., None]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for softcap in (2.0, 3.0) if every else (2.0,):  # each is a compilation
        torch.testing.assert_close(compiled(q, softcap), attend(q, softcap), rtol=1e-5, atol=1e-5)
    if needs_grad:
        gradients = [torch.autograd.grad(f(q, 2.0).square().sum(), q)[0] for f in (compiled, attend)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_out_in_a_compiled_graph() -> None:
    tensors = inputs()

    def attend(out: torch.Tensor, lse: torch.Tensor) -> None:
        sparse_query_attention(*tensors, softcap=2.0, return_lse=True, out=(out, lse))

    ours, theirs = outputs(tensors[0]), outputs(tensors[0])
    attend(*ours)
    torch.compile(attend, fullgraph=True, backend="aot_eager")(*theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def bad_options() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    out, lse = outputs(inputs()[0])
    yield "softcap of 0", {"softcap": 0.0}, ValueError, "softcap is 0.0; it must be a number above 0, or None"
    yield "softcap of none", {"softcap": float("nan")}, ValueError, "softcap is nan; it must be a number above 0"
    yield "softcap of too much", {"softcap": 1e6}, ValueError, "softcap is 1000000.0; it must be at most 10000"
    yield "scale of too little", {"scale": 1e-30}, ValueError, "scale is 1e-30; it must be a number of at least 1e-10"
    yield "sinks of a group", {"sinks": sinks(2)}, ValueError, r"sinks has shape \[2\]; q asks for \[4\]"
    yield "sinks", {"sinks": 1.0}, TypeError, r"sinks is a float; it must be a tensor \[heads\]"
    yield "integer sinks", {"sinks": sinks(4).int()}, TypeError, "sinks has dtype int32; it may be"
    yield "device of sinks", {"sinks": sinks(4).to("meta")}, ValueError, "sinks is on meta"
    yield "lse", {"return_lse": 1}, TypeError, "return_lse is 1; it must be True or False"
    yield "out without lse", {"out": out, "return_lse": True}, ValueError, r"out is a Tensor; .*a pair of tensors"
    yield "out with lse", {"out": (out, lse)}, ValueError, "out is a tuple of 2; with return_lse=False it must be one"
    yield "out a string", {"out": "x"}, ValueError, "out is a str; with return_lse=False it must be one tensor"
    yield "order of out", {"out": out.contiguous()}, ValueError, r"out has strides .*\.transpose\(1, 2\)"
    yield "dtype of out", {"out": out.half()}, TypeError, "out has dtype float16; it may be float32"
    yield "shape of out", {"out": out[:1]}, ValueError, r"out has shape \[1, 4, 24, 32\]"
    yield "shape of lse", {"out": (out, lse.mT), "return_lse": True}, ValueError, r"out\[1\] has shape \[2, 24, 4\]"
    yield "dtype of lse", {"out": (out, lse.half()), "return_lse": True}, TypeError, r"out\[1\] has dtype float16"


@pytest.mark.parametrize(("_", "options", "error", "words"), list(bad_options()), ids=[c[0] for c in bad_options()])
def test_bad_options(_: str, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sparse_query_attention(*inputs(), **options)
