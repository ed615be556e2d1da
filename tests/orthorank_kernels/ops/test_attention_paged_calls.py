"""sparse_query_attention_paged as torch and a caller see it: views, outputs, gradients, operators, bad input."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from orthorank_kernels import op as _library
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.ops.attention_paged import sparse_query_attention_paged
from tests.orthorank_kernels.attention_cases import FP8, Packed, integers, packed, random, stated_packed
from tests.orthorank_kernels.cache_layouts import LAYOUTS, Paged, bits, paged
from tests.orthorank_kernels.ops.test_attention_paged import check, sinks
from tests.orthorank_kernels.tools import DEVICE

BACKENDS = ("torch", "triton")
OPS = torch.ops.orthorank_kernels
LENGTHS, COUNTS = (37, 1, 0, 70, 9, 20), (12, 1, 0, 33, 0, 20)  # an empty sequence, one without queries, one dense


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_launcher_gets_the_views_as_they_are(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[Any, ...]] = []

    def launch(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        got.append(args)
        return args[0], args[0].new_empty(0)

    monkeypatch.setattr(_library, "launcher", lambda path: launch)
    monkeypatch.setattr("orthorank_kernels.dispatch.triton_unavailable", lambda device: None)
    case = packed((50, 33), (17, 12))
    fused = torch.zeros(29, 8, 32, device=DEVICE)
    cache = paged(case, 16, layout)._replace(q=fused[:, :4])
    sparse_query_attention_paged(*cache, backend="triton")
    for ours, theirs in zip(got[0], cache, strict=False):
        assert ours.data_ptr() == theirs.data_ptr()
        assert ours.stride() == theirs.stride()
        assert ours.shape == theirs.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_are_a_slice_of_a_padded_projection(backend: str) -> None:
    case = packed((60, 45), (25, 20))
    fused = torch.full((64, 8 * 32), float("nan"), device=DEVICE)  # more rows than tokens
    q = fused[:45, : 4 * 32].view(45, 4, 32)
    q[:] = case.q
    check(case, paged(case, 16)._replace(q=q), backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_out_is_written_and_returned(backend: str) -> None:
    case = packed(LENGTHS, COUNTS, dtype=torch.float16, tail=3)
    cache = paged(case, 16)
    options = {"softcap": 2.0, "sinks": sinks(), "backend": backend}
    expected = sparse_query_attention_paged(*cache, return_lse=True, **options)
    out, lse = torch.full_like(case.q, float("nan")), torch.full(case.q.shape[:2], float("nan"), device=DEVICE)
    got = sparse_query_attention_paged(*cache, return_lse=True, out=(out, lse), **options)
    assert got[0] is out
    assert got[1] is lse
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    pool = torch.full((500, 4 * 32), float("nan"), dtype=torch.float16, device=DEVICE)  # rows of a larger buffer
    view = pool[: case.q.shape[0]].view(-1, 4, 32)
    sparse_query_attention_paged(*cache, out=view, **options)
    torch.testing.assert_close(view, expected[0], rtol=1e-2, atol=1e-2)
    assert pool[case.q.shape[0] :].isnan().all()


@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 2.0, "sinks": sinks()}], ids=["plain", "options"])
def test_gradients_into_the_cache(options: dict[str, Any]) -> None:
    case = packed((30, 0, 25), (12, 0, 9), tail=2)
    cache = paged(case, 16)
    leaves = [x.double().requires_grad_() for x in (case.q, cache.k_cache, cache.v_cache)]
    weights = random(23, 4, 32, seed=9).double()
    out = sparse_query_attention_paged(*leaves, *cache[3:], **options)
    ours = torch.autograd.grad((out * weights).sum(), leaves)
    stated_leaves = [x.double().requires_grad_() for x in case[:3]]
    out, _ = stated_packed(case._replace(q=stated_leaves[0], k=stated_leaves[1], v=stated_leaves[2]), **options)
    exact = torch.autograd.grad((out * weights).sum(), stated_leaves)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-6)
    pages = [cache.block_table[0, :2].long(), cache.block_table[2, :2].long()]
    for got, want in zip(ours[1:], exact[1:], strict=True):
        rows = torch.cat([got[pages[0]].flatten(0, 1)[:30], got[pages[1]].flatten(0, 1)[:25]])
        torch.testing.assert_close(rows, want, rtol=1e-6, atol=1e-6)
        assert got.count_nonzero() == rows.count_nonzero(), "other slots have no gradient"


def arguments(case: Packed, cache: Paged, **options: Any) -> tuple[Any, ...]:
    defaults = {
        "table_rows": None, "max_seqlen_k": None, "scale": 0.2, "window": None, "softcap": None, "sinks": None,
        "k_scale": None, "v_scale": None, "return_lse": False,
    }  # fmt: skip
    return (*cache, *{**defaults, **options}.values())


@pytest.mark.parametrize("options", ["plain", "options", "float8"])
def test_opcheck(options: str) -> None:
    case = packed((30, 12), (9, 4), tail=1)
    cache = paged(case, 16, dtype=FP8 if options == "float8" else None)
    more: dict[str, Any] = {}
    out = {"attended": torch.empty_like(case.q), "lse": None}
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if options == "options":
        cache = cache._replace(block_table=cache.block_table.flip(0))
        more = {"table_rows": integers([1, 0]), "max_seqlen_k": 30, "window": 9, "softcap": 2.0, "sinks": sinks()}
        more["return_lse"] = True
        out["lse"] = torch.empty(case.q.shape[:2], device=DEVICE)
    if options == "float8":
        more = {"k_scale": random(2).abs(), "v_scale": random(1).abs()}
        checks = checks[1:]  # which multiplies every argument, and torch multiplies no float8
    args = arguments(case, cache, **more)
    torch.library.opcheck(OPS.sparse_query_attention_paged.default, args, test_utils=checks)
    torch.library.opcheck(OPS.sparse_query_attention_paged_out.default, args, out, test_utils=checks)


@pytest.mark.parametrize(
    ("needs_grad", "every"),
    [(False, True), *(pytest.param(True, every, marks=pytest.mark.slow) for every in (False, True))],
)
def test_compiles_into_one_graph(needs_grad: bool, every: bool) -> None:
    case = packed((60, 0, 25), (20, 0, 9), tail=4)
    case.positions[-4:] = 5  # whatever stands there
    cache = paged(case, 16)
    logits = sinks()
    q = case.q.requires_grad_(needs_grad)

    def attend(q: torch.Tensor, window: int, softcap: float | None, bound: int | None) -> torch.Tensor:
        out, lse = sparse_query_attention_paged(
            q, *cache[1:], window=window, softcap=softcap, sinks=logits, max_seqlen_k=bound, return_lse=True
        )
        return out + lse.clamp(min=0)[..., None]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    calls = [(30, 2.0, None), (9, None, 60), (9, 2.0, 60)] if every else [(9, 2.0, 60)]  # each is a compilation
    for args in calls:
        torch.testing.assert_close(compiled(q, *args), attend(q, *args), rtol=1e-5, atol=1e-5)
    if needs_grad:
        gradients = [torch.autograd.grad(f(q, *calls[-1]).square().sum(), q)[0] for f in (compiled, attend)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def bad_inputs() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    case = packed((20, 9), (6, 4))
    q, k_cache, v_cache, positions, _, block_table, seq_lens = paged(case, 16)
    fp8 = {x: bits(y).to(torch.uint8).view(FP8) for x, y in (("k_cache", k_cache.nan_to_num()), ("v_cache", v_cache))}
    one = torch.ones(1, device=DEVICE)
    yield "batch", {"q": q[None]}, ValueError, r"q has shape \[1, 10, 4, 32\]; it must be \[n, heads, head_dim\]"
    yield "joint", {"k_cache": k_cache[:, :, 0]}, ValueError, r"k_cache .* must be \[blocks, block_size, kv_heads, head"
    yield "heads", {"q": q[:, :3]}, ValueError, "q has 3 heads and k_cache has 2; the heads of k_cache must divide"
    yield "dtype", {"k_cache": k_cache.half()}, TypeError, "k_cache has dtype float16 and q float32"
    yield "bytes", {"k_cache": bits(fp8["k_cache"])}, TypeError, "k_cache has dtype uint8; .* float8_e4m3fn"
    yield "values", {"v_cache": v_cache[:, :9]}, ValueError, r"v_cache has shape .* k_cache asks for \[6, 16, 2, 32\]"
    yield "mixed", {"k_cache": fp8["k_cache"]}, TypeError, "v_cache has dtype float32 and k_cache float8_e4m3fn"
    yield "head_dim", {"q": q[..., :16]}, ValueError, r"k_cache has shape .* q asks for \[6, 16, 2, 16\]"
    yield "stride", {"k_cache": k_cache.mT.contiguous().mT}, ValueError, r"k_cache has strides .* k_cache.contiguous"
    yield "positions", {"positions": positions[:5]}, ValueError, r"positions has shape \[5\]; q asks for \[10\]"
    yield "long table", {"block_table": block_table.long()}, TypeError, "block_table has dtype int64; it may be int32"
    yield "flat table", {"block_table": block_table[0]}, ValueError, r"block_table .* must be \[rows, max_blocks\]"
    yield "rows", {"block_table": block_table[:1]}, ValueError, r"block_table has shape .* each of the 2 sequences"
    yield "table's stride", {"block_table": block_table.mT.contiguous().mT}, ValueError, "block_table has strides"
    yield "lengths", {"seq_lens": seq_lens[:1]}, ValueError, r"seq_lens has shape \[1\]; cu_selected asks for \[2\]"
    yield "row numbers", {"table_rows": integers([0])}, ValueError, r"table_rows .* cu_selected asks for \[2\]"
    yield "device", {"block_table": block_table.to("meta")}, ValueError, "block_table is on meta"
    yield "no float8", {"k_scale": one}, ValueError, "k_scale is given and k_cache has dtype float32; only float8 is"
    yield "scale", {**fp8, "v_scale": one.repeat(3)}, ValueError, r"v_scale has shape \[3\]; .* k_cache asks for \[2\]"
    yield "scales", {**fp8, "k_scale": 0.5}, TypeError, r"k_scale is a float; it must be a float32 tensor \[\], \[1\]"
    yield "double scale", {**fp8, "k_scale": one.double()}, TypeError, "k_scale has dtype float64; it may be float32"
    yield "bound", {"max_seqlen_k": "x"}, TypeError, "max_seqlen_k is 'x'; it must be an int"
    yield "out", {"out": q[:, :2]}, ValueError, r"out has shape \[10, 2, 32\]; the op's output asks for \[10, 4, 32\]"
    yield "backend", {"backend": "cuda"}, ValueError, "backend is 'cuda'; it may be one of 'auto'"


@pytest.mark.parametrize(("_", "changes", "error", "words"), list(bad_inputs()), ids=[case[0] for case in bad_inputs()])
def test_bad_inputs(_: str, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    good = paged(packed((20, 9), (6, 4)), 16)._asdict()
    with pytest.raises(error, match=words):
        sparse_query_attention_paged(**{**good, **changes})


def test_out_has_no_gradient() -> None:
    cache = paged(packed((20, 9), (6, 4)), 16)
    with pytest.raises(BackendError, match="out= got an input that requires grad"):
        sparse_query_attention_paged(cache.q.requires_grad_(), *cache[1:], out=torch.empty_like(cache.q))
