"""Compile what a model will launch before the first request does: `warmup`."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels.layout import LONG_ROW
from orthorank_kernels.ops.activation import silu_and_mul
from orthorank_kernels.ops.add_norm import gather_add_rms_norm
from orthorank_kernels.ops.attention import sparse_query_attention
from orthorank_kernels.ops.attention_paged import sparse_query_attention_paged
from orthorank_kernels.ops.attention_varlen import sparse_query_attention_varlen
from orthorank_kernels.ops.kv_cache import apply_rotary_and_cache_
from orthorank_kernels.ops.low_rank import add_low_rank
from orthorank_kernels.ops.norm_score import rms_norm_score
from orthorank_kernels.ops.norm_selection import rms_norm_select
from orthorank_kernels.ops.rotary import apply_rotary_at
from orthorank_kernels.ops.rows import gather_rows, scatter_add_rows_, scatter_rows_
from orthorank_kernels.ops.selection import select_tokens

LAYOUTS = ("batch", "packed", "paged")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-6
# A selection of each size that has its own kernel, and a stream.
TOKENS = (64, 2048, 8192, 16384)
# Few queries have tiles of their own, and a few more share the keys of a long sequence among programs.
FEW = (1, 8, 32, 100)


def warmup(
    *,
    dtype: torch.dtype,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int | None = None,
    rank: int | None = None,
    layout: str = "batch",
    cache: tuple[Tensor, Tensor] | None = None,
    ops: Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    tokens: Sequence[int] = TOKENS,
    device: torch.device | str = "cuda",
) -> dict[str, float]:
    """Launch every op of a selected layer once for each kernel that prompts of any length need, on tensors of zeros.

    A kernel is compiled when it is first launched, which takes seconds; then it is kept, on disk for later processes
    too. What is compiled depends on the model and on which optional arguments a call has; of prompt lengths, batch
    sizes and k on a few steps alone (rows that registers hold, few queries, keys split among programs).

    Args:
        dtype: of the hidden states. hidden: their size. heads, kv_heads, head_dim: of the attention, on this GPU alone
            where heads are split over several.
        intermediate: width of the MLP, for `silu_and_mul`; None leaves that op out.
        rank: of the maps of a corrected plan, for `add_low_rank`; None leaves that op out.
        layout: ``"batch"`` (``[batch, tokens, hidden]``), ``"packed"`` (``[total, hidden]`` with ``cu_seqlens``), or
            ``"paged"``: packed, with attention over a paged cache.
        cache: views ``[blocks, block_size, kv_heads, head_dim]`` of keys and values in the stack's own paged cache (see
            `sparse_query_attention_paged`), of which the strides count and block 0 is read; nothing is written to them.
            None: contiguous ones of ``dtype`` with blocks of 16.
        ops: names of the ops to prepare; None: all of the layout.
        options: keyword arguments that the model's calls will have, by op, such as
            ``{"rms_norm_score": {"weight_offset": 1.0}, "sparse_query_attention": {"window": 4096}}``. Without them,
            k is an int in the batch layout and a tensor in the others, slots are int64, and no optional tensor is
            given, but that the batch layout's attention is launched with queries to rotate, too.
        tokens: prompt lengths, one for each size that has a kernel of its own; fewer need less memory.
        device: the GPU. On a CPU nothing is compiled.

    Returns:
        Seconds that each op took, compilations included; empty on a CPU, where arguments are checked all the same.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, or an op that the layout has not.
        dispatch.BackendError: Triton cannot run on ``device``, or there is no such GPU.

    On a GPU all of a model's kernels; on a CPU there is nothing to compile, unless Triton interprets:

    >>> sizes = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}
    >>> seconds = warmup(dtype=torch.float16, **sizes, ops=["gather_rows"], tokens=[8], device="cpu")
    >>> set(seconds) <= {"gather_rows"}
    True
    """
    device = dispatch.device_of(device)
    _checks.choice("layout", layout, LAYOUTS)
    for name, size in (("hidden", hidden), ("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        _checks.integer(name, size, at_least=1)
    _checks.integer("intermediate", intermediate, at_least=1, none="no gated MLP")
    _checks.integer("rank", rank, at_least=1, none="no maps")
    model, options = _Model(dtype, hidden, heads, kv_heads, head_dim, intermediate, rank, cache, device), options or {}
    _check(model, layout, ops, options, tokens)
    if device.type == "cpu" and not dispatch.interpreting():
        return {}
    if reason := dispatch.triton_unavailable(device) or _absent(device):
        raise dispatch.BackendError(f"warmup on device {device}: {reason}")
    seconds: dict[str, float] = {}
    for n in tokens:
        for selected in sorted({min(n, few) for few in FEW} | {max(1, n // 3)}):
            for name, call in _calls(model, layout, n, selected).items():
                if ops is None or name in ops:
                    began, given = time.perf_counter(), options.get(name, {})
                    call(**given, backend="triton")
                    if name == "rms_norm_select" and layout == "batch" and n > LONG_ROW and "workspace" not in given:
                        # That had room to count scores; a caller's own workspace may have none.
                        call(**given, workspace=model.zeros(1, dtype=torch.int32), backend="triton")
                    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
    return seconds


def _check(m: "_Model", layout: str, ops: object, options: Mapping[str, Mapping[str, Any]], tokens: object) -> None:
    """What no kernel says: there may be none to launch, and a run of minutes is not lost at its end."""
    if m.dtype not in DTYPES:
        raise TypeError(f"dtype is {m.dtype!r}; it may be one of {', '.join(map(str, DTYPES))}")
    if m.heads % m.kv_heads:
        raise ValueError(f"kv_heads is {m.kv_heads} and heads {m.heads}; kv_heads must divide heads")
    for name, value in (("ops", ops), ("tokens", tokens)):
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise TypeError(f"{name} is {value!r}; it must be a sequence: pass ({value!r},)")
    for n in tokens or ():  # type: ignore[attr-defined]
        _checks.integer("tokens", n, at_least=1)
    known = set(_calls(replace(m, device=torch.device("cpu")), layout, 1, 1))
    for name in (*(ops or ()), *options):  # type: ignore[misc]
        if name not in known:
            raise ValueError(f"op {name!r} is not among those of layout {layout!r}: {', '.join(sorted(known))}")
    for name, given in options.items():
        takes = inspect.signature(globals()[name]).parameters
        if wrong := [key for key in given if key not in takes]:
            raise TypeError(f"options[{name!r}] has {wrong[0]!r}; {name} takes {', '.join(takes)}")


def _absent(device: torch.device) -> str | None:
    """Why no kernel can be launched there, with the remedy."""
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        found = f"{count} GPUs here; name one of them, or" if count else "no GPU here;"
        return f"PyTorch {torch.__version__} sees {found} call warmup where the model runs"
    return None


@dataclass(frozen=True)
class _Model:
    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int | None
    rank: int | None
    cache: tuple[Tensor, Tensor] | None
    device: torch.device

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def indices(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def _calls(m: _Model, layout: str, tokens: int, selected: int) -> dict[str, Callable[..., Any]]:
    """Every op of a layout on one sequence; each takes further keyword arguments."""

    def rows(n: int, *rest: int) -> Tensor:
        return m.zeros(1, n, *rest) if layout == "batch" else m.zeros(n, *rest)

    x, compact, weight, table = (
        rows(tokens, m.hidden),
        rows(selected, m.hidden),
        m.zeros(m.hidden),
        rows(tokens, m.head_dim),
    )
    scores, positions = rows(tokens).float(), m.indices(*range(selected))
    packed: dict[str, Any] = {"cu_seqlens": m.indices(0, tokens)}
    q = m.zeros(selected, m.heads, m.head_dim)
    if layout == "batch":
        positions, packed, q = positions[None], {}, q[None].transpose(1, 2)
    request = selected if layout == "batch" else m.indices(selected)
    calls: dict[str, Callable[..., Any]] = {
        "rms_norm_score": partial(rms_norm_score, x, weight, EPS, **packed),
        "select_tokens": partial(_with_k, select_tokens, request, scores, **packed),
        "rms_norm_select": partial(_with_k, rms_norm_select, request, x, weight, EPS, **packed),
        "gather_rows": partial(gather_rows, x, positions),
        "apply_rotary_at": partial(apply_rotary_at, q, table, table, positions),
        "gather_add_rms_norm": partial(gather_add_rms_norm, x, positions, compact, weight, EPS),
        "scatter_rows_": partial(scatter_rows_, x, positions, compact),
        "scatter_add_rows_": partial(scatter_add_rows_, x, positions, compact, compact),
    }
    if m.rank is not None:
        low, up = rows(tokens, m.rank), m.zeros(m.hidden, m.rank)
        calls["add_low_rank"] = partial(add_low_rank, x, low, up, weight, **packed)
    if m.intermediate is not None:
        calls["silu_and_mul"] = partial(silu_and_mul, rows(selected, 2 * m.intermediate))
    return calls | _attention(m, layout, tokens, q, positions, table)


def _attention(
    m: _Model, layout: str, tokens: int, q: Tensor, positions: Tensor, table: Tensor
) -> dict[str, Callable[..., Any]]:
    if layout == "batch":
        k = m.zeros(1, m.kv_heads, tokens, m.head_dim)
        return {"sparse_query_attention": partial(_rotated_or_not, table, q, k, k, positions)}
    cu_selected, cu_keys = m.indices(0, positions.shape[0]), m.indices(0, tokens)
    if layout == "packed":
        k = m.zeros(tokens, m.kv_heads, m.head_dim)
        varlen = partial(sparse_query_attention_varlen, q, k, k, positions, cu_selected, cu_keys)
        return {"sparse_query_attention_varlen": varlen}
    k_cache, v_cache = m.cache or [m.zeros(1, 16, m.kv_heads, m.head_dim) for _ in range(2)]
    blocks = torch.zeros(1, -(-tokens // k_cache.shape[1]), dtype=torch.int32, device=m.device)
    where = (positions, cu_selected, blocks, m.indices(tokens))
    calls: dict[str, Callable[..., Any]] = {
        "sparse_query_attention_paged": partial(sparse_query_attention_paged, q, k_cache, v_cache, *where)
    }
    if k_cache.dtype == m.dtype:  # else a cache of 8 bits, which the stack writes itself
        slots, k = m.zeros(tokens, dtype=torch.int64) - 1, m.zeros(tokens, m.kv_heads, m.head_dim)
        of: dict[str, Any] = {"slots": slots, "keys": k, "values": k, "cos": table, "sin": table}
        calls["apply_rotary_and_cache_"] = partial(apply_rotary_and_cache_, k_cache=k_cache, v_cache=v_cache, **of)
    return calls


def _rotated_or_not(table: Tensor, *args: Any, **options: Any) -> None:
    """Attention of queries that are rotated, as in this package's own layers, and of others, unless options say."""
    sparse_query_attention(*args, **options)
    if "rotary_cos" not in options and table.shape[-1] % 2 == 0:
        sparse_query_attention(*args, **options, rotary_cos=table, rotary_sin=table)


def _with_k(op: Callable[..., Any], k: int | Tensor, *args: Any, **options: Any) -> Any:
    """The selecting op with ``k``, unless the options say what is selected."""
    asked = {} if "k" in options or "threshold" in options else {"k": k}
    return op(*args, **asked, **options)
