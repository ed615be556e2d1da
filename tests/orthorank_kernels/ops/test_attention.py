"""sparse_query_attention: both backends against a softmax written out in float64."""

import ast
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from orthorank_kernels import sparse_query_attention
from orthorank_kernels.dispatch import interpreting
from tests.orthorank_kernels.tools import DEVICE, DTYPES, assert_within_budget, poisoned_outputs

BACKENDS = ("torch", "triton")
OPS = torch.ops.orthorank_kernels
pytestmark = pytest.mark.filterwarnings("error:.* encountered in:RuntimeWarning")  # the interpreter computed a NaN
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    starts: torch.Tensor | None = None,
    query_offset: int = 0,
) -> torch.Tensor:
    """The definition, with every score at once and no thought for memory."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    at = (positions.long() + query_offset)[..., None]
    key = torch.arange(k.shape[2], device=q.device)
    seen = (key <= at) & (positions >= 0)[..., None]
    if window is not None:
        seen &= at - key < window
    if starts is not None:
        seen &= key >= starts[:, None, None]
    scores = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return weights.masked_fill(~seen.any(-1)[:, None, :, None], 0.0) @ v


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def some_positions(batch: int, tokens: int, selected: int, fewer: int = 0, seed: int = 0) -> torch.Tensor:
    """Ascending; each batch row has ``fewer`` entries less than the one before, so -1 at its end."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.full((batch, selected), -1, dtype=torch.int32)
    for b in range(batch):
        count = max(0, selected - b * fewer)
        positions[b, :count] = torch.randperm(tokens, generator=generator)[:count].sort().values.int()
    return positions.to(DEVICE)


def inputs(
    keys: int,
    selected: int,
    heads: tuple[int, int] = (2, 2),
    dim: int = 32,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    tokens: int | None = None,
    fewer: int = 0,
) -> Inputs:
    q = random(batch, heads[0], selected, dim, dtype=dtype, seed=1)
    k, v = (random(batch, heads[1], keys, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    return q, k, v, some_positions(batch, tokens or keys, selected, fewer)


def check(tensors: Inputs, backend: str, **options: Any) -> torch.Tensor:
    """Run one backend on poisoned memory and compare with the definition."""
    q, k, v, positions = tensors
    with poisoned_outputs():
        out = sparse_query_attention(q, k, v, positions, backend=backend, **options)
    exact = written_out(q, k, v, positions, **options)
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    if backend == "torch":
        torch.testing.assert_close(out.double(), exact, **TOLERANCE[q.dtype])
    else:
        eager = sparse_query_attention(q, k, v, positions, backend="torch", **options)
        assert_within_budget(out, eager, exact, q.dtype)
    assert (out[exact == 0] == 0).all(), "a query without keys must give exactly 0"
    return out


TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 3e-6},
    torch.float16: {"rtol": 4e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 1e-2},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("keys", "selected"),
    [(1, 1), (63, 21), (63, 63), (127, 1), (127, 126), (1000, 7), (200, 200)],
    ids=lambda n: str(n),
)
def test_any_number_of_keys_and_selected_queries(keys: int, selected: int, backend: str) -> None:
    check(inputs(keys, selected), backend)


def test_long_prompts_in_pytorch() -> None:
    tensors = inputs(1000, 700, (6, 2), batch=2, fewer=500)
    check(tensors, "torch")
    check(tensors, "torch", window=90, starts=torch.tensor([3, 400], dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_selected_is_dense_causal_attention(backend: str) -> None:
    q, k, v, _ = inputs(130, 130, (4, 2), 64)
    positions = torch.arange(130, dtype=torch.int32, device=DEVICE)[None]
    out = check((q, k, v, positions), backend)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (4, 1), (14, 2), (20, 1)], ids=str)
def test_groups_of_query_heads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(inputs(70, 30, heads, dtype=dtype), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 32, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        check(inputs(40, 15, (2, 1), dim, dtype=dtype), backend)


def masks() -> Iterator[tuple[str, dict[str, Any]]]:
    starts = torch.tensor([0, 60, 199], dtype=torch.int32, device=DEVICE)
    yield "window of 1", {"window": 1}
    yield "window within a block", {"window": 9}
    yield "window over blocks", {"window": 75}
    yield "window over everything", {"window": 2**40}
    yield "left padding", {"starts": starts}
    yield "window and left padding", {"window": 40, "starts": starts}
    yield "cached keys", {"query_offset": 50}
    yield "cached keys, window", {"query_offset": 50, "window": 45}
    yield "keys cut off on the left", {"query_offset": -70, "window": 45}
    yield "scale", {"scale": 0.7}
    yield "everything", {"query_offset": 50, "window": 70, "starts": starts, "scale": 0.01}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [m for _, m in masks()], ids=[name for name, _ in masks()])
def test_windows_padding_and_offsets(options: dict[str, Any], backend: str) -> None:
    check(inputs(200, 60, (2, 1), batch=3, tokens=150, fewer=29), backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_where_nothing_is_selected(backend: str) -> None:
    q, k, v, positions = inputs(50, 20, batch=2, fewer=20)
    assert (positions[1] == -1).all()
    assert (check((q, k, v, positions), backend)[1] == 0).all()
    nothing = sparse_query_attention(q[:, :, :0], k, v, positions[:, :0], backend=backend)
    assert nothing.shape == (2, 2, 0, 32)
    no_keys = sparse_query_attention(q, k[:, :, :0], v[:, :, :0], positions, backend=backend)
    assert no_keys.shape == q.shape
    assert (no_keys == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_alone_equals_the_row_in_a_batch(backend: str) -> None:
    q, k, v, positions = inputs(90, 40, (4, 2), batch=3, fewer=15)
    starts = torch.tensor([0, 20, 5], dtype=torch.int32, device=DEVICE)
    together = sparse_query_attention(q, k, v, positions, starts=starts, backend=backend)
    for b in range(3):
        row = slice(b, b + 1)
        alone = sparse_query_attention(q[row], k[row], v[row], positions[row], starts=starts[row], backend=backend)
        assert torch.equal(alone, together[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend: str) -> None:
    batch, tokens, selected, dim = 2, 60, 25, 32
    positions = some_positions(batch, tokens, 30, fewer=3)[:, :selected]
    fused = random(batch, tokens, 8 * dim)  # 4 query heads, 2 of keys, 2 of values in one projection
    q = fused[:, :selected, : 4 * dim].unflatten(-1, (4, dim)).transpose(1, 2)
    k = fused[..., 4 * dim : 6 * dim].unflatten(-1, (2, dim)).transpose(1, 2)
    v = fused[..., 6 * dim :].unflatten(-1, (2, dim)).transpose(1, 2)
    check((q, k, v, positions), backend)
    cache = random(batch, 2, tokens + 40, dim, seed=5)
    check((q, cache[:, :, :tokens], cache[:, :, 40:], positions), backend)
    check((q.contiguous(), k, cache[:, :, :tokens], positions), backend)
    check((q[:, :, :1], k[:, :, :1], v[:, :, :1], torch.zeros_like(positions[:, :1])), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_outside_the_range_of_a_row_never_matter(backend: str) -> None:
    q, k, v, positions = inputs(120, 20, (2, 1), batch=2, tokens=70, fewer=8)
    starts = torch.tensor([0, 11], dtype=torch.int32, device=DEVICE)
    clean = sparse_query_attention(q, k, v, positions, starts=starts, backend=backend)
    for b in range(2):
        last = int(positions[b].max())
        for x in (k, v):
            x[b, :, last + 1 :] = float("nan")
            x[b, :, : int(starts[b])] = float("inf")
    assert torch.equal(sparse_query_attention(q, k, v, positions, starts=starts, backend=backend), clean)


@pytest.mark.skipif(not interpreting(), reason="a GPU runs its own settings in every other test")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_of_real_gpus(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from orthorank_kernels.triton import configs

    monkeypatch.setattr(configs, "target_of", lambda device: target)
    q, k, v, positions = inputs(400, 90, (6, 2), 64, batch=2, dtype=torch.bfloat16, fewer=40)
    starts = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)
    check((q, k, v, positions), "triton")
    check((q, k, v, positions), "triton", starts=starts, window=150)
    odd = random(2, 400, 3, 70, dtype=torch.bfloat16)[..., :65]  # strides that no tensor descriptor takes
    check((random(2, 3, 90, 65, dtype=torch.bfloat16), *(odd.transpose(1, 2),) * 2, positions), "triton")
    for b in range(2):
        for x in (k, v):
            x[b, :, int(positions[b].max()) + 1 :] = float("nan")
    assert sparse_query_attention(q, k, v, positions, backend="triton").isfinite().all()


def test_64_bit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from orthorank_kernels.triton import attention, attention_launch, configs

    launches: list[dict[str, Any]] = []

    class Recorded:
        def __getitem__(self, grid: Any) -> Any:
            return lambda **options: launches.append(options)

    with monkeypatch.context() as patched:
        patched.setattr(attention_launch, "sparse_query_attention_kernel", Recorded())
        patched.setattr(configs, "target_of", lambda device: "sm_80")
        q = torch.empty(1, 1, 2, 32, dtype=torch.float16, device="meta")  # no memory: only the extents matter
        positions = torch.empty(1, 2, dtype=torch.int32, device="meta")
        for stride in (2**29 - 1, 2**29):
            far = torch.empty_strided((1, 1, 4, 32), (0, 0, stride, 1), dtype=torch.float16, device="meta")
            attention.sparse_query_attention(q, far, far, positions, 1.0, None, None, 0, None, None, False)
    assert [launch["WIDE"] for launch in launches] == [False, True]
    monkeypatch.setattr(attention_launch, "INT32_MAX", 100)
    check(inputs(70, 20), "triton", window=50)


@pytest.mark.gpu
@pytest.mark.huge
@pytest.mark.skipif(DEVICE == "cpu", reason="17 GB of keys and values")
def test_extents_past_32_bits_on_a_gpu() -> None:
    keys, drawn = 2**25 + 100, torch.Generator(DEVICE).manual_seed(0)  # on the GPU: a CPU would take a minute
    q, k, v = (torch.randn(1, 1, n, 128, generator=drawn, device=DEVICE, dtype=torch.float16) for n in (40, keys, keys))
    positions = torch.randint(keys, (1, 40), generator=drawn, device=DEVICE).unique().int()[None]
    q, window = q[:, :, : positions.shape[1]], 1000
    out = sparse_query_attention(q, k, v, positions, window=window)
    first = positions[0].long() - window + 1
    for i in range(0, positions.shape[1], 13):
        near = slice(max(0, int(first[i])), int(positions[0, i]) + 1)
        weights = (q[0, 0, i].double() @ k[0, 0, near].double().T * 128**-0.5).softmax(-1)
        torch.testing.assert_close(out[0, 0, i].double(), weights @ v[0, 0, near].double(), rtol=1e-2, atol=2e-3)


def test_every_group_fills_its_tiles() -> None:
    from orthorank_kernels.triton.configs import launch_settings

    for target in ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"):
        for dtype in DTYPES:
            for dim in (8, 64, 80, 256):
                for group in range(1, 130):
                    settings, warps, stages = launch_settings(dim, group, dtype, target)
                    head_tiles = -(-group // settings["PACK"])
                    assert settings["PACK"] * head_tiles >= group
                    used = group * (settings["BLOCK_M"] // settings["PACK"]) / (settings["BLOCK_M"] * head_tiles)
                    assert used > 0.55, f"{target}, {dtype}, head_dim {dim}, group {group}: {used:.0%} of the rows"
                    assert settings["BLOCK_D"] >= dim
                    assert warps in (1, 2, 4, 8)
                    assert stages >= 1


def test_products_of_float32_are_exact() -> None:
    """`tl.dot` rounds float32 to TF32 unless told otherwise, with errors of 1e-3 that the interpreter never shows."""
    from orthorank_kernels.triton import attention_step

    calls = [node for node in ast.walk(ast.parse(inspect.getsource(attention_step))) if isinstance(node, ast.Call)]
    dots = [call for call in calls if ast.unparse(call.func) == "tl.dot"]
    assert len(dots) == 2
    for dot in dots:
        assert {"input_precision": "'ieee'"}.items() <= {k.arg: ast.unparse(k.value) for k in dot.keywords}.items()
