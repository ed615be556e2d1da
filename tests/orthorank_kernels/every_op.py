"""A call of every public op and layout, for the tests that hold for all of them.

`calls(tensors, sizes)` gives the arguments of each; ``tensors`` decides what they are made of: numbers on a CPU
(`Numbers`), or nothing but shapes on a device that need not be there (`Shapes`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import orthorank_kernels as ok

NOT_OPS = {"__version__", "is_supported", "keep_count", "warmup"}
PAGE = 16  # tokens of a page of the caches
RANK = 16  # of a map
IN_PLACE = {"scatter_rows_": 1, "scatter_add_rows_": 1, "apply_rotary_and_cache_": 2}  # how many first arguments


@dataclass(frozen=True)
class Sizes:
    """Of a call. ``selected`` is k, and the number of positions."""

    batch: int = 2
    tokens: int = 48
    selected: int = 16
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32

    def with_(self, **changes: Any) -> "Sizes":
        return replace(self, **changes)


class Shapes:
    """Tensors without numbers, on ``device``."""

    def __init__(self, device: str):
        self.device = device

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def ints(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(len(values), dtype=dtype, device=self.device)

    def cumulative(self, sequences: int, tokens: int) -> Tensor:
        return self.ints(*[i * tokens for i in range(sequences + 1)])

    def positions(self, batch: int, selected: int, tokens: int) -> Tensor:
        return torch.empty(batch, selected, dtype=torch.int32, device=self.device)


class Numbers(Shapes):
    """Seeded random tensors on a CPU or a GPU that is there."""

    def __init__(self, device: str = "cpu", seed: int = 0):
        super().__init__(device)
        self.generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def ints(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def positions(self, batch: int, selected: int, tokens: int) -> Tensor:
        rows = [torch.randperm(tokens, generator=self.generator)[:selected].sort().values for _ in range(batch)]
        return torch.stack(rows).to(self.device, torch.int32)


@dataclass(frozen=True)
class Call:
    """One public function and what it is called with."""

    op: str
    args: tuple[Any, ...]
    options: Mapping[str, Any]

    def __call__(self, **more: Any) -> Any:
        return getattr(ok, self.op)(*self.args, **self.options, **more)

    def tensors(self) -> dict[int | str, Tensor]:
        """The tensors among the arguments, by place or name."""
        given = {**dict(enumerate(self.args)), **self.options}
        return {at: value for at, value in given.items() if isinstance(value, Tensor)}

    def written(self) -> list[Tensor]:
        """The arguments that an op which returns nothing writes to."""
        return list(self.args[: IN_PLACE[self.op]])

    def where(self, change: Callable[[Tensor], Tensor], *places: int | str) -> "Call":
        """The call with some of its tensors changed."""
        args = tuple(change(a) if i in places else a for i, a in enumerate(self.args))
        return Call(self.op, args, {n: change(v) if n in places else v for n, v in self.options.items()})


def calls(tensors: Shapes, sizes: Sizes = Sizes()) -> dict[str, Call]:
    """Calls of every public op, by a name that begins with the op's."""
    found = {**_selection(tensors, sizes), **_rows(tensors, sizes), **_attention(tensors, sizes)}
    found |= _caches(tensors, sizes)
    assert {call.op for call in found.values()} == set(ok.__all__) - NOT_OPS, "an op is missing here"
    assert all(name.split(",")[0] == call.op for name, call in found.items())
    return found


def _scores(new: Shapes, s: Sizes) -> dict[str, Call]:
    op = "rms_norm_score"
    x, residual = (new.floats(s.batch, s.tokens, s.hidden, dtype=s.dtype) for _ in range(2))
    weight, bias, shared = (new.floats(s.hidden, dtype=s.dtype) for _ in range(3))
    sink, cu_seqlens = new.floats(s.batch, s.hidden, dtype=s.dtype), new.cumulative(s.batch, s.tokens)
    rows = {"starts": new.ints(*range(s.batch)), "lengths": new.ints(*[s.tokens - s.batch] * s.batch)}
    packed = {"residual": residual.flatten(0, 1), "sink": sink, "cu_seqlens": cu_seqlens}
    layer = {"norm": "layer", "bias": bias, "score": "cosine", "copy_input": True}
    return {
        op: Call(op, (x, weight, 1e-6), {}),
        f"{op}, stored sink, padding": Call(op, (x, weight, 1e-6), {"sink": sink, **rows}),
        f"{op}, Gemma, residual": Call(op, (x, weight, 1e-6), {"weight_offset": 1.0, "residual": residual}),
        f"{op}, LayerNorm, cosine, copy": Call(op, (x, weight, 1e-6), layer),
        f"{op}, packed, residual": Call(op, (x.flatten(0, 1), weight, 1e-6), packed),
        f"{op}, packed, scores alone": Call(
            op, (x.flatten(0, 1), None, 1e-6), {"sink": shared, "cu_seqlens": cu_seqlens, "write_norm": False}
        ),
    }


def _selection(new: Shapes, s: Sizes) -> dict[str, Call]:
    x, weight = new.floats(s.batch, s.tokens, s.hidden, dtype=s.dtype), new.floats(s.hidden, dtype=s.dtype)
    scores, sink = new.floats(s.batch, s.tokens), new.floats(s.batch, s.hidden, dtype=s.dtype)
    k = new.ints(*[s.selected] * s.batch)
    starts, lengths = new.ints(*range(s.batch)), new.ints(*[s.tokens - s.batch] * s.batch)
    rows: dict[str, Any] = {"starts": starts, "lengths": lengths}
    choice = {**rows, "sink_positions": new.ints(*[-1] * s.batch), "keep_last": 1, "max_selected": s.selected}
    packed = {"cu_seqlens": new.ints(*[i * s.tokens for i in range(s.batch + 1)])}
    chosen = {**packed, "position_offsets": new.ints(*[0] * s.batch), "max_selected": s.batch * s.selected}
    every, each = new.floats(s.batch * s.tokens, s.hidden, dtype=s.dtype), new.floats(s.batch * s.tokens)
    workspace = {"workspace": new.ints(*[0] * s.batch)}
    return {
        **_scores(new, s),
        "select_tokens": Call("select_tokens", (scores, s.selected), {}),
        "select_tokens, k on the device, padding": Call("select_tokens", (scores, k), choice),
        "select_tokens, threshold": Call("select_tokens", (scores,), {"threshold": 0.5, **choice}),
        "select_tokens, largest": Call(
            "select_tokens", (scores, s.selected), {**rows, "largest": True, "relative": True}
        ),
        "select_tokens, packed": Call("select_tokens", (each, k), packed),
        "select_tokens, packed, threshold": Call("select_tokens", (each,), {"threshold": 0.5, **chosen}),
        "rms_norm_select": Call("rms_norm_select", (x, weight, 1e-6, s.selected), workspace),
        "rms_norm_select, k on the device, padding": Call(
            "rms_norm_select", (x, weight, 1e-6, k), {"sink": sink, **choice, **workspace}
        ),
        "rms_norm_select, packed": Call(
            "rms_norm_select", (every, weight, 1e-6, k), {"sink": sink, **chosen, **workspace}
        ),
        "rms_norm_select, packed, threshold": Call(
            "rms_norm_select", (every, weight, 1e-6), {"threshold": 0.5, "sink": sink, **packed, **workspace}
        ),
    }


def _rows(new: Shapes, s: Sizes) -> dict[str, Call]:
    x, weight = new.floats(s.batch, s.tokens, s.hidden, dtype=s.dtype), new.floats(s.hidden, dtype=s.dtype)
    rows = new.floats(s.batch, s.selected, s.hidden, dtype=s.dtype)
    positions = new.positions(s.batch, s.selected, s.tokens)
    residual, bias = new.floats(*rows.shape, dtype=s.dtype), new.floats(s.hidden, dtype=s.dtype)
    q = new.floats(s.batch, s.selected, s.heads, s.head_dim, dtype=s.dtype).transpose(1, 2)
    cos, sin = (new.floats(1, s.tokens, s.head_dim // 2, dtype=s.dtype).repeat(1, 1, 2) for _ in range(2))
    layer = {"norm": "layer", "bias": bias, "weight_offset": 1.0, "scale": 0.5, "addend_weight": weight}
    # Not x[0]: indexing asks a fake GPU for its driver.
    x_, positions_, rows_, residual_ = (t.select(0, 0) for t in (x, positions, rows, residual))
    return {
        "gather_rows": Call("gather_rows", (x, positions), {}),
        "gather_rows, packed": Call("gather_rows", (x_, positions_), {}),
        "gather_add_rms_norm": Call("gather_add_rms_norm", (x, positions, rows, weight, 1e-6), {}),
        "gather_add_rms_norm, options": Call("gather_add_rms_norm", (x, positions, rows, weight, 1e-6), layer),
        "gather_add_rms_norm, packed": Call("gather_add_rms_norm", (x_, positions_, rows_, weight, 1e-6), {}),
        "scatter_rows_": Call("scatter_rows_", (x, positions, rows), {}),
        "scatter_rows_, packed": Call("scatter_rows_", (x_, positions_, rows_), {}),
        "scatter_add_rows_": Call("scatter_add_rows_", (x, positions, rows, residual), {"scale": 0.5}),
        "scatter_add_rows_, packed": Call("scatter_add_rows_", (x_, positions_, rows_, residual_), {}),
        "silu_and_mul": Call("silu_and_mul", (rows, residual), {}),
        "silu_and_mul, merged, packed": Call("silu_and_mul", (rows_,), {"positions": positions_}),
        **_low_rank(new, s, x),
        "apply_rotary_at": Call("apply_rotary_at", (q, cos, sin, positions), {}),
        "apply_rotary_at, interleaved": Call("apply_rotary_at", (q, cos, sin, positions), {"interleaved": True}),
        "apply_rotary_at, packed": Call(
            "apply_rotary_at", (q.transpose(1, 2).select(0, 0), cos.squeeze(0), sin.squeeze(0), positions_), {}
        ),
    }


def _low_rank(new: Shapes, s: Sizes, x: Tensor) -> dict[str, Call]:
    low, up = new.floats(s.batch, s.tokens, RANK, dtype=s.dtype), new.floats(s.hidden, RANK, dtype=s.dtype)
    bias, sinks = new.floats(s.hidden, dtype=s.dtype), new.ints(*[s.batch, *[-1] * (s.batch - 1)])
    padding = {"starts": new.ints(*range(s.batch)), "lengths": new.ints(*[s.tokens - s.batch] * s.batch)}
    packed = x.flatten(0, 1), low.flatten(0, 1), up, bias
    ends = {"cu_seqlens": new.cumulative(s.batch, max(0, s.tokens - 1))}
    return {
        "add_low_rank": Call("add_low_rank", (x, low, up, bias), {}),
        "add_low_rank, padding": Call("add_low_rank", (x, low, up), {**padding, "sink_positions": sinks}),
        "add_low_rank, packed": Call("add_low_rank", packed, ends),
        "add_low_rank, packed, sinks": Call("add_low_rank", packed[:3], {**ends, "sink_positions": sinks}),
    }


def _caches(new: Shapes, s: Sizes) -> dict[str, Call]:
    """All tokens of the batch but each row's first, to caches as vLLM has them; slots from the last to the first."""
    op, total = "apply_rotary_and_cache_", s.batch * s.tokens
    pages = -(-total // PAGE)
    merged = new.floats(total, 2 * s.kv_heads, s.head_dim, dtype=s.dtype)
    keys, values = merged.split(s.kv_heads, 1)
    slots = [-1 if s.tokens and t % s.tokens == 0 else total - t for t in range(total)]
    cos, sin = (new.floats(total, s.head_dim // 2, dtype=s.dtype).repeat(1, 2) for _ in range(2))
    positions = [-1 if t == 1 else total - 1 - t for t in range(total)]

    def caches() -> list[Tensor]:
        joint = new.floats(pages, s.kv_heads, PAGE, 2 * s.head_dim, dtype=s.dtype).transpose(1, 2)
        return [joint.narrow(-1, begin, s.head_dim) for begin in (0, s.head_dim)]

    part = {"rotary_dim": s.head_dim // 4 * 2, "interleaved": True}
    halves = (table.narrow(1, 0, s.head_dim // 4) for table in (cos, sin))
    return {
        op: Call(op, (*caches(), new.ints(*slots, dtype=torch.int64), keys, values, cos, sin), {}),
        f"{op}, a part, interleaved": Call(
            op, (*caches(), new.ints(*slots), keys, values, *halves, new.ints(*positions)), part
        ),
    }


def _attention(new: Shapes, s: Sizes) -> dict[str, Call]:
    q = new.floats(s.batch, s.selected, s.heads, s.head_dim, dtype=s.dtype).transpose(1, 2)
    k, v = (new.floats(s.batch, s.kv_heads, s.tokens, s.head_dim, dtype=s.dtype) for _ in range(2))
    positions = new.positions(s.batch, s.selected, s.tokens)
    options = {"window": s.tokens // 2, "starts": new.ints(*range(s.batch)), "scale": 0.3, "query_offset": 0}
    return {
        "sparse_query_attention": Call("sparse_query_attention", (q, k, v, positions), {}),
        "sparse_query_attention, window, padding": Call("sparse_query_attention", (q, k, v, positions), options),
        "sparse_query_attention, cap, sinks, lse": Call(
            "sparse_query_attention", (q, k, v, positions), _of_scores(new, s)
        ),
        "sparse_query_attention, rotary": Call("sparse_query_attention", (q, k, v, positions), _rotary(new, s, 1)),
        **_packed_attention(new, s),
    }


def _of_scores(new: Shapes, s: Sizes) -> dict[str, Any]:
    return {"softcap": 5.0, "sinks": new.floats(s.heads), "return_lse": True}


def _rotary(new: Shapes, s: Sizes, *batch: int) -> dict[str, Any]:
    """Tables of half of each head, without the repetition."""
    cos, sin = (new.floats(*batch, s.tokens, s.head_dim // 4, dtype=s.dtype) for _ in range(2))
    return {"rotary_cos": cos, "rotary_sin": sin, "rotary_dim": s.head_dim // 4 * 2}


def _packed_attention(new: Shapes, s: Sizes) -> dict[str, Call]:
    """Sequences of one length, so that all sizes are those of a batch; pages in order."""
    q = new.floats(s.batch * s.selected, 3 * s.heads, s.head_dim, dtype=s.dtype).narrow(1, 0, s.heads)
    k, v = (new.floats(s.batch * s.tokens, s.kv_heads, s.head_dim, dtype=s.dtype) for _ in range(2))
    positions = new.positions(s.batch, s.selected, s.tokens).flatten()
    cu_selected, cu_seqlens_k = (new.cumulative(s.batch, n) for n in (s.selected, s.tokens))
    packed = (q, k, v, positions, cu_selected, cu_seqlens_k)
    options = {"window": s.tokens // 2 + 1, "scale": 0.3, "max_seqlen_k": s.tokens, **_of_scores(new, s)}

    pages = -(-s.tokens // PAGE)
    joint = new.floats(s.batch * pages, s.kv_heads, PAGE, 2 * s.head_dim, dtype=s.dtype).transpose(1, 2)
    table = new.ints(*range(s.batch * pages)).view(s.batch, pages)
    tables = (positions, cu_selected, table, new.ints(*[s.tokens] * s.batch))
    paged = (q, *joint.split(s.head_dim, -1), *tables)
    small = (q, *joint.to(torch.float8_e4m3fn).split(s.head_dim, -1), *tables)
    rows = {"table_rows": new.ints(*range(s.batch))}
    scales = {"k_scale": new.floats(1), "v_scale": new.floats(s.kv_heads)}
    return {
        "sparse_query_attention_varlen": Call("sparse_query_attention_varlen", packed, {}),
        "sparse_query_attention_varlen, everything": Call("sparse_query_attention_varlen", packed, options),
        "sparse_query_attention_varlen, rotary": Call(
            "sparse_query_attention_varlen", packed, _rotary(new, s) | {"rotary_interleaved": True}
        ),
        "sparse_query_attention_paged": Call("sparse_query_attention_paged", paged, {}),
        "sparse_query_attention_paged, everything": Call("sparse_query_attention_paged", paged, {**options, **rows}),
        "sparse_query_attention_paged, rotary": Call("sparse_query_attention_paged", paged, _rotary(new, s)),
        "sparse_query_attention_paged, float8": Call("sparse_query_attention_paged", small, scales),
    }


def flat(results: Any) -> list[Tensor]:
    """The tensors among what an op returns."""
    if isinstance(results, (tuple, list)):
        return [tensor for result in results for tensor in flat(result)]
    return [results] if isinstance(results, Tensor) else []
