"""apply_rotary_at: both backends against a loop in float64 and against Hugging Face's own function."""

import math
from functools import partial

import pytest
import torch

from orthorank_kernels import apply_rotary_at
from orthorank_kernels.layout import empty_ordered_like
from orthorank_kernels.pytorch import rotary as pytorch
from tests.orthorank_kernels.tools import DEVICE, DTYPES, assert_within_budget

BACKENDS = ("torch", "triton")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tables(batch: int, tokens: int, rotary_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as Hugging Face's rotary modules make them; each batch row starts at another position."""
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    position = torch.arange(tokens)[None, :, None] + 3 * torch.arange(batch)[:, None, None]
    angle = (position * frequency).repeat(1, 1, 2)
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


def positions_with_gaps(batch: int, tokens: int, selected: int) -> torch.Tensor:
    positions = torch.full((batch, selected), -1, dtype=torch.int32)
    for b in range(batch):
        count = max(0, selected - b)
        positions[b, :count] = torch.linspace(b, tokens - 1, count).int()
    return positions.to(DEVICE)


def rotated_by_loop(x, cos, sin, positions, interleaved=False):
    """Float64, one token at a time, as complex numbers."""
    batch, heads, selected, head_dim = x.shape
    half = cos.shape[-1] // 2
    if interleaved:  # half-split, between two permutations of the elements
        order = [*range(0, 2 * half, 2), *range(1, 2 * half, 2), *range(2 * half, head_dim)]
        turned = rotated_by_loop(x[..., order], cos, sin, positions)
        return torch.empty_like(turned).index_copy_(-1, torch.tensor(order, device=x.device), turned)
    out = torch.zeros(batch, heads, selected, head_dim, dtype=torch.float64)
    for b in range(batch):
        for i in range(selected):
            token = i if positions is None else int(positions[b, i])
            if token < 0:
                continue
            table = b if cos.shape[0] > 1 else 0
            turn = torch.complex(cos[table, token, :half].double(), sin[table, token, :half].double()).cpu()
            one = x[b, :, i].double().cpu()
            turned = torch.complex(one[:, :half], one[:, half : 2 * half]) * turn
            out[b, :, i] = torch.cat([turned.real, turned.imag, one[:, 2 * half :]], -1)
    return out.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "rotary_dim"),
    [
        (1, 9, 64, 64),
        (63, 32, 128, 128),
        (127, 1, 256, 256),
        (1000, 5, 80, 80),
        (4097, 4, 80, 32),
        (5, 3, 64, 16),
        (64, 2, 20, 10),
        (2, 1, 3, 2),
        (6, 71, 64, 64),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_is_as_exact_as_eager(backend, tokens, heads, head_dim, rotary_dim, dtype, poisoned):
    selected = min(tokens, 5)
    x = random(2, selected, heads, head_dim, dtype=dtype).transpose(1, 2)
    cos, sin = tables(1, tokens, rotary_dim, dtype)
    positions = positions_with_gaps(2, tokens, selected)
    actual = apply_rotary_at(x, cos, sin, positions, rotary_dim=rotary_dim, backend=backend)
    exact = rotated_by_loop(x, cos, sin, positions)
    assert_within_budget(actual, pytorch.apply_rotary_at(x, cos, sin, positions), exact, dtype)
    kept = x[..., rotary_dim:].masked_fill((positions < 0)[:, None, :, None], 0)
    assert torch.equal(actual[..., rotary_dim:], kept)
    assert actual.transpose(1, 2).is_contiguous(), "as x: a transposed view"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "rotary_dim"),
    [(1, 9, 64, 64), (63, 5, 80, 32), (127, 2, 20, 10), (2, 1, 3, 2), (6, 3, 256, 64), (5, 71, 64, 64)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_pairs(backend, tokens, heads, head_dim, rotary_dim, dtype, poisoned):
    selected = min(tokens, 5)
    x = random(2, selected, heads, head_dim, dtype=dtype).transpose(1, 2)
    cos, sin = tables(1, tokens, rotary_dim, dtype)
    positions = positions_with_gaps(2, tokens, selected)
    actual = apply_rotary_at(x, cos, sin, positions, interleaved=True, rotary_dim=rotary_dim, backend=backend)
    exact = rotated_by_loop(x, cos, sin, positions, interleaved=True)
    assert_within_budget(actual, pytorch.apply_rotary_at(x, cos, sin, positions, True), exact, dtype)
    kept = x[..., rotary_dim:].masked_fill((positions < 0)[:, None, :, None], 0)
    assert torch.equal(actual[..., rotary_dim:], kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_is_hugging_face_s_glm(backend):
    glm = pytest.importorskip("transformers.models.glm.modeling_glm")
    q, (cos, sin) = random(1, 12, 4, 64).transpose(1, 2), tables(1, 12, 32, torch.float32)
    expected, _ = glm.apply_rotary_pos_emb(q, q, cos, sin)
    actual = apply_rotary_at(q, cos, sin, interleaved=True, rotary_dim=32, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_a_batch_of_one(backend, interleaved, poisoned):
    x = random(9, 3, 2 * 16, dtype=torch.bfloat16)[..., 16:]  # [selected, heads, head_dim], part of a projection
    cos, sin = (t[0] for t in tables(1, 40, 8, torch.float32))
    positions = positions_with_gaps(1, 40, 9)[0]
    positions[-2:] = -1
    options = {"interleaved": interleaved, "rotary_dim": 8, "backend": backend}
    actual = apply_rotary_at(x, cos, sin, positions, **options)
    batch = apply_rotary_at(x.transpose(0, 1)[None], cos[None], sin[None], positions[None], **options)
    assert torch.equal(actual, batch[0].transpose(0, 1))
    assert actual.is_contiguous()
    everyone = apply_rotary_at(x, cos[:9], sin[:9], **options)
    assert torch.equal(everyone[0], actual[0])
    assert not torch.equal(everyone[1], actual[1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_without_the_repetition(backend, interleaved):
    """As a serving stack keeps them: the cosines of a position, then its sines."""
    x, (cos, sin) = random(5, 3, 40), (t[0] for t in tables(1, 30, 32, torch.float32))
    cache, positions = torch.cat([cos[:, :16], sin[:, :16]], -1), positions_with_gaps(1, 30, 5)[0]
    options = {"interleaved": interleaved, "rotary_dim": 32, "backend": backend}
    actual = apply_rotary_at(x, cache[:, :16], cache[:, 16:], positions, **options)
    assert torch.equal(actual, apply_rotary_at(x, cos, sin, positions, **options))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_out_is_written_and_returned_and_may_be_x(backend, in_place, packed, interleaved):
    x = random(7, 3, 16) if packed else random(2, 7, 3, 16).transpose(1, 2)
    cos, sin = (t[0] if packed else t for t in tables(1, 20, 8, torch.float32))
    positions = positions_with_gaps(2, 20, 7)
    args = (cos, sin, positions[0] if packed else positions)
    options = {"interleaved": interleaved, "rotary_dim": 8, "backend": backend}
    expected = apply_rotary_at(x, *args, **options)
    out = x if in_place else torch.full((*x.shape[:-1], 20), float("nan"), device=DEVICE)[..., 2:18]
    assert apply_rotary_at(x, *args, out=out, **options) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("table_batch", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_without_positions(backend, table_batch, tokens, poisoned):
    x = random(2, 3, tokens, 8, dtype=torch.bfloat16)
    cos, sin = tables(table_batch, tokens, 8, torch.float32)
    actual = apply_rotary_at(x, cos, sin, backend=backend)
    expected = pytorch.apply_rotary_at(x, cos, sin)
    assert_within_budget(actual, expected, rotated_by_loop(x, cos, sin, None), torch.bfloat16)
    everyone = torch.arange(tokens, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    assert torch.equal(actual, apply_rotary_at(x, cos, sin, everyone, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_hugging_face_s_rotation(backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q = random(2, 12, 4, 64).transpose(1, 2)
    cos, sin = tables(1, 12, 64, torch.float32)
    expected, _ = llama.apply_rotary_pos_emb(q, q, cos, sin)
    picked = positions_with_gaps(2, 12, 5)
    actual = apply_rotary_at(q[:, :, :5], cos, sin, picked, backend=backend)
    for b, row in enumerate(picked.tolist()):
        for i, p in enumerate(row):
            if p == i:
                torch.testing.assert_close(actual[b, :, i], expected[b, :, p], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apply_rotary_at(q, cos, sin, backend=backend), expected, rtol=1e-6, atol=1e-6)


LAYOUTS = {
    "[batch, heads, tokens, dim]": lambda: random(2, 3, 7, 16),
    "[batch, tokens, heads, dim]": lambda: random(2, 7, 3, 16).transpose(1, 2),
    "[heads, tokens, batch, dim]": lambda: random(3, 7, 2, 16).permute(2, 0, 1, 3),
    "slice of a fused projection": lambda: random(2, 7, 3 * 48)[..., 48:96].unflatten(-1, (3, 16)).transpose(1, 2),
    "slice of the heads' elements": lambda: random(2, 7, 3, 40).transpose(1, 2)[..., 8:24],
    "one token of many": lambda: random(2, 7, 3, 16).transpose(1, 2)[:, :, 4:5],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_strides_are_honoured_and_the_order_in_memory_kept(backend, layout, poisoned):
    x = LAYOUTS[layout]()
    selected = x.shape[2]
    cos, sin = (t.repeat(1, 1, 3)[..., 16:32] for t in tables(2, 20, 16, torch.float32))
    positions = positions_with_gaps(2, 20, selected + 4)[:, 2 : 2 + selected]
    actual = apply_rotary_at(x, cos, sin, positions, backend=backend)
    torch.testing.assert_close(actual.double(), rotated_by_loop(x, cos, sin, positions), rtol=1e-6, atol=1e-6)
    assert actual.stride() == empty_ordered_like(x).stride()
    order = sorted(range(4), key=x.stride, reverse=True)
    assert actual.permute(order).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_entries_are_zeros_whatever_is_in_the_way(backend, poisoned):
    x = torch.full((2, 3, 2, 10), float("inf"), device=DEVICE)
    cos = sin = torch.full((1, 4, 8), float("nan"), device=DEVICE)
    positions = torch.full((2, 2), -1, dtype=torch.int32, device=DEVICE)
    for n in (4, 0):
        got = apply_rotary_at(x, cos[:, :n], sin[:, :n], positions, rotary_dim=8, backend=backend)
        assert torch.equal(got, torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_dimensions(backend, shape):
    cos, sin = tables(1, 5, 4, torch.float32)
    positions = torch.zeros(shape[0], shape[2], dtype=torch.int32, device=DEVICE)
    assert apply_rotary_at(torch.empty(shape, device=DEVICE), cos, sin, positions, backend=backend).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_past_32_bits(backend):
    """Heads and table rows 2^30 elements apart; of the memory between, nothing is touched."""
    far = 2**30
    try:
        storage = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    x = storage.as_strided((1, 3, 1, 8), (2 * far, far, 8, 1))
    x.copy_(random(1, 3, 1, 8, dtype=torch.float16))
    cos, sin = (storage.as_strided((1, 3, 8), (2 * far, far, 1), offset) for offset in (16, 32))
    for far_table, table in zip((cos, sin), tables(1, 3, 8, torch.float16), strict=True):
        far_table.copy_(table)
    positions = torch.tensor([[2]], dtype=torch.int32, device=DEVICE)
    actual = apply_rotary_at(x, cos, sin, positions, backend=backend)
    torch.testing.assert_close(actual.double(), rotated_by_loop(x, cos, sin, positions), rtol=1e-3, atol=1e-3)


def test_gradients_are_exact():
    positions = torch.tensor([[0, 3], [1, -1]], dtype=torch.int32)
    x = torch.randn(2, 2, 3, 6, dtype=torch.float64).transpose(1, 2).requires_grad_()
    cos, sin = (t.cpu().requires_grad_() for t in tables(1, 5, 4, torch.float64))
    for interleaved in (False, True):
        turn = partial(apply_rotary_at, positions=positions, interleaved=interleaved, rotary_dim=4)
        assert torch.autograd.gradcheck(turn, (x, cos, sin))


def test_the_operator_keeps_its_promises_to_torch():
    cos, sin = tables(1, 9, 8, torch.float32)
    op = torch.ops.orthorank_kernels.apply_rotary_at.default
    x = random(2, 4, 3, 8).transpose(1, 2)
    torch.library.opcheck(op, (x, cos, sin, positions_with_gaps(2, 9, 4)))
    torch.library.opcheck(op, (x[:, :, :, :8], cos[:, :4], sin[:, :4], None))
    torch.library.opcheck(op, (x, cos, sin, positions_with_gaps(2, 9, 4), True, 6))
    into = torch.ops.orthorank_kernels.apply_rotary_at_out.default
    torch.library.opcheck(into, (x, cos, sin, positions_with_gaps(2, 9, 4)), {"out": torch.zeros_like(x)})
    torch.library.opcheck(op, (random(2, 4, 3, 24).transpose(1, 2)[..., 8:16], cos[:, :4], sin[:, :4], None))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_it_compiles_into_one_graph(requires_grad):
    x = random(2, 4, 3, 8).transpose(1, 2).requires_grad_(requires_grad)
    cos, sin = tables(1, 9, 8, torch.float32)
    compiled = torch.compile(apply_rotary_at, fullgraph=True, backend="aot_eager", dynamic=True)
    for selected in (2, 3, 4):
        args = (x[:, :, :selected], cos, sin, positions_with_gaps(2, 9, selected))
        actual, expected = compiled(*args), apply_rotary_at(*args)
        torch.testing.assert_close(actual, expected)
        if not requires_grad:  # the traced gradient is free to choose its layout
            assert actual.stride() == expected.stride()


def test_rotation_keeps_lengths():
    x, (cos, sin) = random(1, 2, 5, 8), tables(1, 5, 8, torch.float32)
    turned = apply_rotary_at(x, cos, sin)
    assert math.isclose(turned.norm().item(), x.norm().item(), rel_tol=1e-6)
    assert not torch.equal(turned[:, :, 1:], x[:, :, 1:])
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_expanded_heads():
    x = torch.randn(1, 1, 3, 8, device=DEVICE).expand(1, 4, 3, 8)
    angles = torch.randn(1, 3, 4, device=DEVICE).repeat(1, 1, 2)
    expected = apply_rotary_at(x.contiguous(), angles.cos(), angles.sin(), backend="torch")
    for backend in ("torch", "triton"):
        out = apply_rotary_at(x, angles.cos(), angles.sin(), backend=backend)
        assert out.stride(-1) == 1
        torch.testing.assert_close(out, expected)
