"""sparse_query_attention_varlen: packed sequences against a loop over queries, and against the batch op."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from orthorank_kernels import sparse_query_attention
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.ops.attention_varlen import sparse_query_attention_varlen
from tests.orthorank_kernels.attention_cases import Packed, assert_right, integers, packed, random, stated_packed
from tests.orthorank_kernels.tools import DEVICE, DTYPES, poisoned_outputs

BACKENDS = ("torch", "triton")
OPS = torch.ops.orthorank_kernels
LENGTHS, COUNTS = (37, 1, 0, 70, 9, 20), (12, 1, 0, 33, 0, 20)  # an empty sequence, one without queries, one dense


def sinks(heads: int = 4) -> torch.Tensor:
    return random(heads, seed=5) * 4


def check(case: Packed, backend: str, **options: Any) -> torch.Tensor:
    def run(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        with poisoned_outputs():
            out, lse = sparse_query_attention_varlen(*case.tensors, return_lse=True, backend=backend, **options)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        return out, lse

    return assert_right(run, stated_packed(case, **options), case.q.dtype, backend)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window of 1": {"window": 1},
    "window": {"window": 40},
    "window over everything": {"window": 2**40},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": sinks()},
    "everything": {"window": 30, "softcap": 3.0, "sinks": sinks(), "scale": 0.5, "max_seqlen_k": 70},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], backend: str) -> None:
    case = packed(LENGTHS, COUNTS)
    out = check(case, backend, **options)
    # Without the lse: torch's fused attention, and a kernel of its own.
    if backend == "torch" or options.get("softcap") == 3.0:
        alone = sparse_query_attention_varlen(*case.tensors, backend=backend, **options)
        torch.testing.assert_close(alone, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 runs in PyTorch")
    check(packed(LENGTHS, COUNTS, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim: int, backend: str) -> None:
    check(packed((40, 9), (15, 3), (2, 1), dim), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (16, 1), (7, 1)], ids=str)
def test_groups_of_query_heads(heads: tuple[int, int], backend: str) -> None:
    check(packed((40, 9), (15, 3), heads), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_queries_over_long_keys(backend: str) -> None:
    check(packed((500, 3, 270), (1, 1, 2)), backend)
    check(packed((500, 3, 270), (1, 1, 2)), backend, max_seqlen_k=500, window=300)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [1, 70])
def test_queries_past_the_selected_ones_give_nothing(tail: int, backend: str) -> None:
    case = packed(LENGTHS, COUNTS, tail=tail)
    check(case, backend)
    case.positions[-tail:] = 5  # whatever stands there
    case.q[-tail:] = float("nan")
    out, lse = sparse_query_attention_varlen(*case.tensors, sinks=sinks(), return_lse=True, backend=backend)
    assert (out[-tail:] == 0).all()
    assert (lse[-tail:] == float("-inf")).all()
    assert out[:-tail].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_of_minus_1_inside_a_sequence(backend: str) -> None:
    case = packed((40, 30), (20, 10))
    expected = sparse_query_attention_varlen(*case.tensors, backend=backend)
    case.positions[15:20] = -1
    case.positions[29:] = -1
    out, lse = sparse_query_attention_varlen(*case.tensors, return_lse=True, backend=backend)
    blind = case.positions < 0
    assert (out[blind] == 0).all()
    assert (lse[blind] == float("-inf")).all()
    torch.testing.assert_close(out[~blind], expected[~blind])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_at_all(backend: str) -> None:
    for lengths, counts, tail in (((), (), 0), ((), (), 3), ((5,), (0,), 0), ((0, 0), (0, 0), 4), ((7, 5), (0, 0), 2)):
        case = packed(lengths, counts, tail=tail)
        with poisoned_outputs():
            out, lse = sparse_query_attention_varlen(*case.tensors, return_lse=True, backend=backend)
        assert out.shape == (tail, 4, 32)
        assert lse.shape == (tail, 4)
        assert (out == 0).all()
        assert (lse == float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sequence_is_a_batch_of_one(backend: str) -> None:
    case = packed((200,), (90,))
    for options in ({}, {"window": 40, "softcap": 2.0, "sinks": sinks()}):
        out, lse = sparse_query_attention_varlen(*case.tensors, return_lse=True, backend=backend, **options)
        q, k, v = (x.transpose(0, 1)[None] for x in (case.q, case.k, case.v))
        batch, batch_lse = sparse_query_attention(
            q, k, v, case.positions[None], return_lse=True, backend=backend, **options
        )
        torch.testing.assert_close(out, batch[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse, batch_lse[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_alone_equals_the_sequence_among_others(backend: str) -> None:
    case = packed(LENGTHS, COUNTS)
    together = sparse_query_attention_varlen(*case.tensors, max_seqlen_k=70, backend=backend)
    query, key = 0, 0
    for length, count in zip(LENGTHS, COUNTS, strict=True):
        queries, keys = slice(query, query + count), slice(key, key + length)
        alone = sparse_query_attention_varlen(
            case.q[queries], case.k[keys], case.v[keys], case.positions[queries],
            integers([0, count]), integers([0, length]), max_seqlen_k=70, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(alone, together[queries], rtol=1e-6, atol=1e-6)
        query, key = query + count, key + length


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_in_chunks_equals_the_prompt_at_once(backend: str) -> None:
    case = packed((150, 70), (60, 33))
    once, once_lse = sparse_query_attention_varlen(*case.tensors, return_lse=True, backend=backend)
    owner = torch.tensor([0] * 60 + [1] * 33, device=DEVICE)
    for begin, end in ((0, 41), (41, 42), (42, 150)):
        here = (case.positions >= begin) & (case.positions < end)
        so_far = [min(150, end), min(70, end)]
        counts = [int((here & (owner == s)).sum()) for s in (0, 1)]
        k, v = (torch.cat([x[: so_far[0]], x[150 : 150 + so_far[1]]]) for x in (case.k, case.v))
        cu = [integers([0, a, a + b]) for a, b in (counts, so_far)]
        out, lse = sparse_query_attention_varlen(
            case.q[here], k, v, case.positions[here], *cu, return_lse=True, backend=backend
        )
        torch.testing.assert_close(out, once[here], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, once_lse[here], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_no_query_sees_never_matter(backend: str) -> None:
    case = packed((80, 60, 70), (20, 10, 0))
    clean = sparse_query_attention_varlen(*case.tensors, window=30, backend=backend)
    query = 0
    for start, count in ((0, 20), (80, 10)):
        mine = case.positions[query : query + count]
        last, first = int(mine.max()), max(0, int(mine.min()) - 29)
        for x in (case.k, case.v):
            x[start : start + first] = float("inf")
            x[start + last + 1 : start + (80 if start == 0 else 60)] = float("nan")
        query += count
    for x in (case.k, case.v):
        x[140:] = float("nan")
    assert torch.equal(sparse_query_attention_varlen(*case.tensors, window=30, backend=backend), clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend: str) -> None:
    case = packed((60, 45), (25, 20))
    total = torch.zeros(105, 8 * 32, device=DEVICE)  # 4 query heads, 2 of keys, 2 of values in one projection
    fused = (total[:, :128], total[:, 128:192], total[:, 192:])
    views = [x.unflatten(-1, (-1, 32)) for x in fused]
    for view, x in zip(views, (case.q, case.k, case.v), strict=True):
        view[: x.shape[0]] = x
    apart = case._replace(q=views[0][:45], k=views[1], v=views[2], positions=case.positions.clone())
    assert not apart.q.is_contiguous()
    check(apart, backend)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (case.k, case.v)]
    check(case._replace(k=heads_first[0], v=heads_first[1]), backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_out_is_written_and_returned(backend: str) -> None:
    case = packed(LENGTHS, COUNTS, dtype=torch.float16, tail=3)
    options = {"softcap": 2.0, "sinks": sinks(), "backend": backend}
    expected = sparse_query_attention_varlen(*case.tensors, return_lse=True, **options)
    out, lse = torch.full_like(case.q, float("nan")), torch.full(case.q.shape[:2], float("nan"), device=DEVICE)
    got = sparse_query_attention_varlen(*case.tensors, return_lse=True, out=(out, lse), **options)
    assert got[0] is out
    assert got[1] is lse
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    pool = torch.full((500, 4 * 32), float("nan"), dtype=torch.float16, device=DEVICE)  # rows of a larger buffer
    view = pool[: case.q.shape[0]].view(-1, 4, 32)
    sparse_query_attention_varlen(*case.tensors, out=view, **options)
    torch.testing.assert_close(view, expected[0], rtol=1e-2, atol=1e-2)
    assert pool[case.q.shape[0] :].isnan().all()


@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 2.0, "sinks": sinks()}], ids=["plain", "options"])
def test_gradients(options: dict[str, Any]) -> None:
    case = packed((30, 0, 25), (12, 0, 9), tail=2)
    options = dict(options)
    leaves = [x.double().requires_grad_() for x in (case.q, case.k, case.v, sinks())]
    leaves = leaves if "sinks" in options else leaves[:3]
    weights = random(23, 4, 32, seed=9).double(), random(23, 4, seed=10).double()[:21]

    def gradients(attend: Any) -> tuple[torch.Tensor, ...]:
        if "sinks" in options:
            options["sinks"] = leaves[3]
        out, lse = attend(case._replace(q=leaves[0], k=leaves[1], v=leaves[2]), **options)
        return torch.autograd.grad((out * weights[0]).sum() + (lse[:21] * weights[1]).sum(), leaves)

    ours = gradients(lambda c, **kwargs: sparse_query_attention_varlen(*c.tensors, return_lse=True, **kwargs))
    for name, a, b in zip(("q", "k", "v", "sinks"), ours, gradients(stated_packed), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize(
    "options",
    [{}, {"max_seqlen_k": 30, "window": 9, "softcap": 2.0, "sinks": sinks(), "return_lse": True}],
    ids=["plain", "options"],
)
def test_opcheck(options: dict[str, Any]) -> None:
    case = packed((30, 12), (9, 4), tail=1)
    defaults = {"max_seqlen_k": None, "scale": 0.2, "window": None, "softcap": None, "sinks": None, "return_lse": False}
    args = (*case.tensors, *{**defaults, **options}.values())
    torch.library.opcheck(OPS.sparse_query_attention_varlen.default, args)
    out = {"attended": torch.empty_like(case.q), "lse": None}
    if options:
        out["lse"] = torch.empty(case.q.shape[:2], device=DEVICE)
    torch.library.opcheck(OPS.sparse_query_attention_varlen_out.default, args, out)


@pytest.mark.parametrize(
    ("needs_grad", "every"), [(False, True), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_compiles_into_one_graph(needs_grad: bool, every: bool) -> None:
    case = packed((60, 0, 25), (20, 0, 9), tail=4)
    case.positions[-4:] = 5  # whatever stands there
    logits = sinks()
    q = case.q.requires_grad_(needs_grad)

    def attend(q: torch.Tensor, window: int, softcap: float | None) -> torch.Tensor:
        out, lse = sparse_query_attention_varlen(
            q, *case.tensors[1:], window=window, softcap=softcap, sinks=logits, return_lse=True
        )
        return out + lse.clamp(min=0)[..., None]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    calls = [(30, 2.0), (9, None), (9, 2.0)] if every else [(9, 2.0)]  # each is a compilation
    for window, softcap in calls:
        torch.testing.assert_close(compiled(q, window, softcap), attend(q, window, softcap), rtol=1e-5, atol=1e-5)
    if needs_grad:
        gradients = [torch.autograd.grad(f(q, *calls[-1]).square().sum(), q)[0] for f in (compiled, attend)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def bad_inputs() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    q, k, v, positions, cu_selected, cu_seqlens_k = packed((20, 9), (6, 4)).tensors
    yield "batch", {"q": q[None]}, ValueError, r"q has shape \[1, 10, 4, 32\]; it must be \[n, heads, head_dim\]"
    yield "heads", {"q": q[:, :3]}, ValueError, "q has 3 heads and k has 2; the heads of k must divide"
    yield "dtype", {"k": k.half()}, TypeError, "k has dtype float16 and q float32"
    yield "keys and values", {"v": v[:9]}, ValueError, r"v has shape \[9, 2, 32\]; k asks for \[29, 2, 32\]"
    yield "head_dim", {"q": q[..., :16]}, ValueError, r"k has shape .* q asks for \[29, 2, 16\]"
    yield "stride", {"k": k.mT.contiguous().mT}, ValueError, r"k has strides .* k.contiguous\(\)"
    yield "long positions", {"positions": positions.long()}, TypeError, "positions has dtype int64; it may be int32"
    yield "positions", {"positions": positions[:5]}, ValueError, r"positions has shape \[5\]; q asks for \[10\]"
    yield "list", {"cu_selected": [0, 6, 10]}, TypeError, r"cu_selected is a list; it must be an int32 tensor \[seqs"
    yield "no sequence", {"cu_selected": cu_selected[:0]}, ValueError, r"cu_selected has shape \[0\]; .* with a 0"
    yield "sequences", {"cu_seqlens_k": cu_seqlens_k[:2]}, ValueError, r"cu_seqlens_k .* cu_selected asks for \[3\]"
    yield "device", {"cu_seqlens_k": cu_seqlens_k.to("meta")}, ValueError, "cu_seqlens_k is on meta"
    yield "stride of positions", {"positions": positions.repeat(2)[::2]}, ValueError, "positions has strides"
    yield "window of 0", {"window": 0}, ValueError, "window is 0; it must be an int of at least 1"
    yield "bound", {"max_seqlen_k": 1.5}, TypeError, "max_seqlen_k is 1.5; it must be an int"
    yield "bound below 0", {"max_seqlen_k": -1}, ValueError, "max_seqlen_k is -1; it must be an int of at least 0"
    yield "sinks", {"sinks": sinks(3)}, ValueError, r"sinks has shape \[3\]; q asks for \[4\]"
    yield "out", {"out": q[:, :2]}, ValueError, r"out has shape \[10, 2, 32\]; the op's output asks for \[10, 4, 32\]"
    yield "order of out", {"out": q.mT.contiguous().mT}, ValueError, "out has strides .* must be contiguous"
    yield "backend", {"backend": "cuda"}, ValueError, "backend is 'cuda'; it may be one of 'auto'"


@pytest.mark.parametrize(("_", "changes", "error", "words"), list(bad_inputs()), ids=[case[0] for case in bad_inputs()])
def test_bad_inputs(_: str, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    case = packed((20, 9), (6, 4))
    good = dict(zip(("q", "k", "v", "positions", "cu_selected", "cu_seqlens_k"), case.tensors, strict=True))
    with pytest.raises(error, match=words):
        sparse_query_attention_varlen(**{**good, **changes})


def test_out_has_no_gradient() -> None:
    case = packed((20, 9), (6, 4))
    with pytest.raises(BackendError, match="out= got an input that requires grad"):
        sparse_query_attention_varlen(case.q.requires_grad_(), *case.tensors[1:], out=torch.empty_like(case.q))
