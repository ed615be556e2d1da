"""apply_rotary_and_cache_: to the last bit `apply_rotary_at` and then a write by index, and nothing else is written."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank_kernels import apply_rotary_and_cache_, apply_rotary_at
from orthorank_kernels.dispatch import BackendError
from tests.orthorank_kernels.cache_layouts import LAYOUTS
from tests.orthorank_kernels.tools import DEVICE

BACKENDS = ("torch", "triton")
BLOCKS, SIZE = 7, 8
VLLM = "vllm LBHNC"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def views(layout: str, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of caches that hold numbers already."""

    def new(*shape: int) -> Tensor:
        return random(*shape, dtype=dtype, seed=9)

    return LAYOUTS[layout](new, BLOCKS, SIZE, kv_heads, head_dim)


def projection(tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values between the queries and whatever else a merged product gives."""
    merged = random(tokens, 4 * kv_heads, head_dim, dtype=dtype)
    return merged[:, kv_heads : 2 * kv_heads], merged[:, 2 * kv_heads : 3 * kv_heads]


def some_slots(tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Anywhere; of every four tokens one has none, or one that the cache has not."""
    slots = torch.randperm(BLOCKS * SIZE, generator=torch.Generator().manual_seed(tokens))[:tokens]
    slots[1::4] = torch.tensor([-1, BLOCKS * SIZE, 2**31 - 1, -(2**31)]).repeat(tokens)[: len(slots[1::4])]
    return slots.to(DEVICE, dtype)


def some_positions(tokens: int, rows: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Of tables with so many rows; one token has none, and one that is not written has one past the tables."""
    positions = torch.arange(tokens).flip(0) % rows
    positions[2::5] = -1
    positions[1] = rows + 5
    return positions.to(DEVICE, dtype)


def is_rotary_and_write(
    backend: str, keys: Tensor, values: Tensor, caches: tuple[Tensor, Tensor], slots: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None = None, **how: Any,
) -> None:  # fmt: skip
    storage = caches[0]._base if caches[0]._base is not None else caches[0]
    storages = [storage, caches[1]._base if caches[1]._base is not None else caches[1]]
    before = [x.clone() for x in storages]
    written = (slots >= 0) & (slots < BLOCKS * SIZE)
    if positions is not None:
        written &= positions >= 0
    assert 0 < int(written.sum()) < len(slots)
    at = slots[written].long() // SIZE, slots[written].long() % SIZE
    rows = written.nonzero()[:, 0] if positions is None else positions[written]
    expected = apply_rotary_at(keys[written], cos, sin, rows.int(), **how, backend=backend), values[written]
    assert apply_rotary_and_cache_(*caches, slots, keys, values, cos, sin, positions, **how, backend=backend) is None
    for cache, rows in zip(caches, expected, strict=True):
        assert torch.equal(cache[at], rows)
    for cache, old in zip(caches, before, strict=True):  # with these slots put back, all is as it was
        cache[at] = old.as_strided(cache.shape, cache.stride(), cache.storage_offset())[at]
    for now, old in zip(storages, before, strict=True):
        assert torch.equal(now, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "rotary_dim", "width", "interleaved"),
    [
        (8, 128, 128, 64, False),
        (3, 64, 64, 64, False),
        (1, 80, 32, 32, True),
        (5, 20, 10, 5, False),
        (2, 24, 24, 24, True),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_apply_rotary_at_and_a_write(backend, kv_heads, head_dim, rotary_dim, width, interleaved, dtype):
    keys, values = projection(13, kv_heads, head_dim, dtype)
    cos, sin = (random(13, rotary_dim // 2, dtype=dtype, seed=s).repeat(1, 2)[:, :width] for s in (1, 2))
    how = {"interleaved": interleaved, "rotary_dim": rotary_dim}
    is_rotary_and_write(backend, keys, values, views(VLLM, kv_heads, head_dim, dtype), some_slots(13), cos, sin, **how)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_of_every_stack(backend, layout):
    """With tables as vLLM has them, one row for each position, and int64 for indices."""
    keys, values = projection(13, 2, 16, torch.float16)
    table = random(9, 16, seed=1)
    positions, slots = some_positions(13, 9, torch.int64), some_slots(13)
    caches = views(layout, 2, 16, torch.float16)
    is_rotary_and_write(backend, keys, values, caches, slots, *table.chunk(2, -1), positions, rotary_dim=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_of_32_bits(backend):
    keys, values = projection(13, 2, 16, torch.float32)
    cos, sin = random(9, 16, seed=1), random(9, 16, seed=2)
    cos, sin = (torch.cat([t[:, :8], t[:, :8]], -1) for t in (cos, sin))
    slots, positions = some_slots(13, torch.int32), some_positions(13, 9)
    is_rotary_and_write(backend, keys, values, views(VLLM, 2, 16, torch.float32), slots, cos, sin, positions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_write(backend):
    """No token, no slot, no block; and what is not written is not looked at."""
    keys, values = projection(4, 2, 8, torch.float32)
    angles = torch.full((4, 8), float("nan"), device=DEVICE)
    caches = views(VLLM, 2, 8, torch.float32)
    before = [x.clone() for x in caches]
    none = torch.full((4,), -1, device=DEVICE)
    apply_rotary_and_cache_(*caches, none, keys, values, angles, angles, backend=backend)
    apply_rotary_and_cache_(*caches, none[:0], keys[:0], values[:0], angles[:0], angles[:0], backend=backend)
    empty = [x[:0] for x in caches]
    apply_rotary_and_cache_(*empty, none + 3, keys, values, angles, angles, backend=backend)
    assert all(map(torch.equal, caches, before))


def arguments(device: str = DEVICE, **changes: Any) -> dict[str, Any]:
    keys, values = projection(4, 2, 8, torch.float32)
    k_cache, v_cache = views("sglang NHD", 2, 8, torch.float32)
    of = {"k_cache": k_cache, "v_cache": v_cache, "slots": torch.arange(4), "keys": keys, "values": values}
    of |= {"cos": torch.ones(4, 8), "sin": torch.ones(4, 8)}
    return {name: x.to(device) for name, x in of.items()} | changes


CACHE = torch.zeros(BLOCKS, SIZE, 2, 8)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "k_cache has dtype float8_e4m3fn, .* no scale; rotate the keys with apply_rotary_at and write "
     "both with the stack's own update of its cache, or keep k_cache in", {"k_cache": CACHE.to(torch.float8_e4m3fn)}),
    (TypeError, "v_cache has dtype uint8, and this op applies no scale", {"v_cache": CACHE.to(torch.uint8)}),
    (TypeError, "k_cache has dtype float16 and keys float32", {"k_cache": CACHE.half()}),
    (TypeError, "values has dtype float16 and keys float32", {"values": torch.zeros(4, 2, 8).half()}),
    (ValueError, r"k_cache has shape \[2, 7, .*pass cache.unbind\(0\)", {"k_cache": CACHE.expand(2, 7, 8, 2, 8)}),
    (ValueError, "k_cache has shape .*the shape of keys asks for", {"k_cache": torch.zeros(7, 8, 2, 16)}),
    (ValueError, "k_cache has shape .*its block_size must be at least 1", {"k_cache": CACHE[:, :0]}),
    (ValueError, "v_cache has shape .*the shape of k_cache asks for", {"v_cache": CACHE[:3]}),
    (ValueError, "k_cache has strides .*the last one must be 1", {"k_cache": torch.zeros(7, 8, 8, 2).transpose(2, 3)}),
    (ValueError, "k_cache has shape .*makes elements share memory", {"k_cache": CACHE[:1].expand(7, 8, 2, 8)}),
    (ValueError, "k_cache shares memory with v_cache", {"k_cache": CACHE, "v_cache": CACHE}),
    (ValueError, "v_cache shares memory with keys", {"v_cache": CACHE, "keys": CACHE[0, 2:6]}),
    (ValueError, r"values has shape \[3, 2, 8\]; the shape of keys", {"values": torch.zeros(3, 2, 8)}),
    (TypeError, "slots has dtype float32; it may be int32, int64", {"slots": torch.zeros(4)}),
    (ValueError, r"slots has shape \[3\]; the tokens of keys", {"slots": torch.arange(3)}),
    (ValueError, "slots is on meta and keys on cpu", {"slots": torch.arange(4, device="meta")}),
    (TypeError, "positions has dtype int16", {"positions": torch.arange(4).short()}),
    (IndexError, "positions holds 4, and cos has 4 tokens", {"positions": torch.arange(1, 5)}),
    (ValueError, "cos has 3 tokens and keys 4; pass positions", {"cos": torch.ones(3, 8), "sin": torch.ones(3, 8)}),
    (ValueError, "rotary_dim is 6 and cos has shape", {"rotary_dim": 6}),
    (TypeError, "interleaved is 1; it must be True or False", {"interleaved": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), WRONG, ids=[message[:40] for _, message, _ in WRONG])
def test_errors_name_the_argument_and_the_fix(error, message, changes):
    with pytest.raises(error, match=message):
        apply_rotary_and_cache_(**arguments("cpu", **changes))


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_what_autograd_does_not_let_be_written_is_refused_by_name(name):
    with pytest.raises(BackendError, match=f"{name} is a leaf that requires grad"):
        apply_rotary_and_cache_(**arguments("cpu", **{name: CACHE.clone().requires_grad_()}))


def test_gradients_are_exact():
    """Of caches, too: what is written over has none, what stays has its own."""
    slots, positions = torch.tensor([5, -1, 0, 9, 3]), torch.tensor([0, 1, 2, 3, -1])
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 1, 4), (2, 4, 1, 4), (5, 1, 4),
              (5, 1, 4), (4, 2), (4, 2))]  # fmt: skip

    def written(k_cache: Tensor, v_cache: Tensor, *rest: Tensor, none: bool = False) -> tuple[Tensor, Tensor]:
        caches = k_cache.clone(), v_cache.clone()
        to = slots.fill_(-1) if none else slots
        apply_rotary_and_cache_(*caches, to, *rest, positions, rotary_dim=4)
        return caches

    assert torch.autograd.gradcheck(written, leaves)
    assert torch.autograd.gradcheck(lambda *x: written(*x, none=True), leaves)


def test_the_operator_keeps_its_promises_to_torch():
    of = arguments()
    caches = of.pop("k_cache"), of.pop("v_cache")
    op = torch.ops.orthorank_kernels.apply_rotary_and_cache_.default
    torch.library.opcheck(op, (*caches, *of.values()))
    torch.library.opcheck(op, (*caches, *of.values(), torch.arange(4, device=DEVICE), True, 6))


def test_it_compiles_into_one_graph():
    compiled = torch.compile(apply_rotary_and_cache_, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 3, 4):
        one, other = arguments(), arguments()
        for of, op in ((one, apply_rotary_and_cache_), (other, compiled)):
            op(**{n: x if "cache" in n else x[:tokens] for n, x in of.items()})
        assert torch.equal(one["k_cache"], other["k_cache"])
        assert torch.equal(one["v_cache"], other["v_cache"])
