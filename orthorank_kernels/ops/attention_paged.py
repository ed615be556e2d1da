"""Attention of the selected queries to keys and values that lie in the pages of a serving stack's cache."""

from typing import Any

import torch

from orthorank_kernels import checks as _checks
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.ops import attention_arguments as _attention
from orthorank_kernels.pytorch import attention_paged as pytorch
from orthorank_kernels.reference import attention as reference

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What to do with caches that hold keys and values together.
UNBIND = "of one tensor for both pass cache.unbind(0), or cache.unbind(1) where blocks come first"
SPLIT = "of a cache [blocks, kv_heads, block_size, 2 * head_dim] pass cache.transpose(1, 2).chunk(2, -1)"


@planned
def sparse_query_attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cu_selected: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    table_rows: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_dim: int | None = None,
    out: _attention.Out = None,
    backend: str = "auto",
) -> Any:
    """Causal attention of selected queries, each at its own position, over a paged cache.

    Sequence s owns the queries ``cu_selected[s] .. cu_selected[s + 1]`` and ``seq_lens[s]`` keys; key j of it is
    ``k_cache[block_table[t, j // block_size], j % block_size]`` with ``t = table_rows[s]``, or s. Query i attends to
    the keys j of its sequence with ``j <= positions[i]`` and, with a window, ``positions[i] - j < window``. A query
    that sees no key, every query whose position is -1 and every query past ``cu_selected[-1]`` gives exactly 0. See
    `sparse_query_attention` for the scores.

    No value waits for the host. Entries of the block table past a sequence's last key are never followed, and cache
    slots past it never reach a result, whatever they hold. The caches are read where they are, as the views that
    serving stacks have of them:

    - vLLM from 0.26 on, ``[blocks, kv_heads, block_size, 2 * head_dim]``: ``.transpose(1, 2).split(head_dim, -1)``;
    - older vLLM, ``[2, blocks, block_size, kv_heads, head_dim]`` or ``[blocks, 2, ...]``: ``.unbind(0)`` or ``(1)``;
    - SGLang, ``[slots, kv_heads, head_dim]``: ``.view(-1, page_size, kv_heads, head_dim)``; with pages of 1, its
      ``req_to_token`` is the block table and ``req_pool_indices`` are the ``table_rows``;
    - heads before tokens, ``[blocks, kv_heads, block_size, head_dim]``: ``.transpose(1, 2)``.

    Args:
        q: queries, float32, float16 or bfloat16 ``[n, heads, head_dim]``, last stride 1. Float64 runs in PyTorch.
        k_cache, v_cache: ``[blocks, block_size, kv_heads, head_dim]``, of the dtype of q, float8_e4m3fn or
            float8_e5m2; kv_heads divides heads, and consecutive query heads share a key/value head. Any strides whose
            last one is 1.
        positions: int32 ``[n]``, ascending in each sequence: positions in the whole sequence, cached part included.
        cu_selected: int32 ``[seqs + 1]``, from 0, never falling, as `select_tokens` returns it.
        block_table: int32 ``[rows, max_blocks]``, last stride 1.
        seq_lens: int32 ``[seqs]``, keys of each sequence, those of this call included.
        table_rows: int32 ``[seqs]``, the row of the block table of each sequence; its own number if None.
        max_seqlen_k: the largest of ``seq_lens`` or more, known on the host: how far few queries are split over the
            keys. None takes ``max_blocks * block_size``. A smaller number is an error on a CPU; on a GPU results are
            undefined.
        scale: factor on q k^T before the softmax, at least 1e-10; ``head_dim ** -0.5`` if None.
        window: how many keys a query sees at most, itself included (sliding window); None sees all.
        softcap: above 0 and at most 1e4, or None: the logits ``s = scale * q k`` become ``softcap * tanh(s / softcap)``
            (Gemma 2).
        sinks: floating point ``[heads]``, one finite logit a head that joins the softmax's denominator alone
            (gpt-oss).
        k_scale, v_scale: float32 above 0, what the values of a float8 cache are multiplied by: ``[1]`` or a tensor
            without dimensions for all heads, or ``[kv_heads]``; 1 if None.
        return_lse: also return the natural logarithm of the softmax's denominator, sink included; a query that sees no
            key has -inf.
        rotary_cos, rotary_sin: tables ``[tokens, width]`` to rotate q by as it is read, each query by the
            row of its entry of ``positions``, as `apply_rotary_at` would before; None: q is not rotated. Floating
            point, any strides whose last one is 1.
        rotary_interleaved, rotary_dim: ``interleaved`` and ``rotary_dim`` of `apply_rotary_at`.
        out: where to write, shape and dtype of ``q``, contiguous; with ``return_lse`` a pair. None allocates.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``. Inputs that require grad take ``"torch"``.

    Returns:
        ``[n, heads, head_dim]``, contiguous, dtype of q. With ``return_lse`` a pair of it and the lse, float32
        ``[n, heads]``.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or stride, or an illegal value.
        IndexError: on a CPU, an entry of ``block_table`` that is looked up is no page of the cache.
        dispatch.BackendError: the requested backend cannot run here.

    Example:
        >>> import torch
        >>> k_cache = torch.zeros(4, 2, 1, 4)  # 4 pages of 2 keys; equal scores: means of the values seen
        >>> v_cache = torch.arange(8.0).view(4, 2, 1, 1).expand(4, 2, 1, 4).contiguous()
        >>> block_table = torch.tensor([[3, 0], [1, -9]], dtype=torch.int32)
        >>> seq_lens = torch.tensor([3, 1], dtype=torch.int32)
        >>> positions, cu_selected = torch.tensor([[0, 2, 0], [0, 2, 3]], dtype=torch.int32)
        >>> q = torch.zeros(3, 2, 4)
        >>> sparse_query_attention_paged(q, k_cache, v_cache, positions, cu_selected, block_table, seq_lens)[:, 0, 0]
        tensor([6.0000, 4.3333, 2.0000])
    """
    _check(q, k_cache, v_cache, positions, cu_selected, block_table, seq_lens, table_rows)
    k_scale, v_scale = _scale("k_scale", k_scale, k_cache, q), _scale("v_scale", v_scale, k_cache, q)
    _attention.check_longest(max_seqlen_k, cu_selected, lengths=seq_lens)
    _attention.check_options(q, scale, window, softcap, sinks, return_lse)
    _check_pages(k_cache, positions, cu_selected, block_table, seq_lens, table_rows, window)
    rotary = _attention.check_rotary(q, positions, rotary_cos, rotary_sin, rotary_interleaved, rotary_dim)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    indices = (positions, cu_selected, block_table, seq_lens, table_rows, max_seqlen_k)
    args = (q, k_cache, v_cache, *indices, scale, window, softcap, sinks, k_scale, v_scale, return_lse, *rotary)
    return _attention.run(_OP, args, q, backend, return_lse, _attention.packed_out(q, out, return_lse))


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cu_selected: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    table_rows: torch.Tensor | None,
) -> None:
    _checks.tensor("q", q, "[n, heads, head_dim]")
    for name, value in (("k_cache", k_cache), ("v_cache", v_cache)):
        layout = "[blocks, block_size, kv_heads, head_dim]"
        _checks.tensor(name, value, layout, (*_checks.FLOATING, *FP8), hints={5: UNBIND})
    if k_cache.dtype not in FP8:
        _checks.same_dtype("q", q, k_cache=k_cache)
    _checks.same_dtype("k_cache", k_cache, v_cache=v_cache)
    _checks.same_device("q", q, k_cache=k_cache, v_cache=v_cache)
    if k_cache.shape[1] == 0:
        raise ValueError(f"k_cache has shape {list(k_cache.shape)}; its block_size must be at least 1")
    _checks.shape("k_cache", k_cache, [*k_cache.shape[:3], q.shape[2]], "q", SPLIT)
    _checks.shape("v_cache", v_cache, list(k_cache.shape), "k_cache")
    _attention.check_heads("k_cache", k_cache.shape[2], q.shape[1])
    _checks.unit_last_stride(q=q, k_cache=k_cache, v_cache=v_cache)
    _attention.check_packed(q, positions, cu_selected)
    sequences = cu_selected.shape[0] - 1
    _attention.check_index("seq_lens", seq_lens, "[seqs]", q, sequences, "cu_selected")
    _checks.tensor("block_table", block_table, "[rows, max_blocks]", (torch.int32,))
    _checks.same_device("q", q, block_table=block_table)
    _checks.unit_last_stride(block_table=block_table)
    if table_rows is not None:
        _attention.check_index("table_rows", table_rows, "[seqs]", q, sequences, "cu_selected")
    elif block_table.shape[0] < sequences:
        raise ValueError(
            f"block_table has shape {list(block_table.shape)}; without table_rows it must have a row for each of the "
            f"{sequences} sequences of cu_selected"
        )
    _check_lengths(k_cache, cu_selected, block_table, seq_lens, table_rows)


def _check_lengths(
    k_cache: torch.Tensor,
    cu_selected: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    table_rows: torch.Tensor | None,
) -> None:
    """On a CPU, where looking is free: the keys of every sequence with queries have entries in the block table."""
    if not _checks.readable(cu_selected, block_table, seq_lens, table_rows):
        return
    queries = cu_selected.diff().tolist()
    capacity = block_table.shape[1] * k_cache.shape[1]
    rows = range(seq_lens.shape[0]) if table_rows is None else table_rows.tolist()
    for s, (length, row) in enumerate(zip(seq_lens.tolist(), rows, strict=True)):
        if queries[s] == 0:
            continue
        if not 0 <= length <= capacity:
            raise ValueError(
                f"seq_lens[{s}] is {length}; it must be from 0 to {capacity}, the keys that a row of block_table "
                f"{list(block_table.shape)} holds in pages of {k_cache.shape[1]}"
            )
        if length and not 0 <= row < block_table.shape[0]:
            raise ValueError(f"table_rows[{s}] is {row}; block_table has rows 0 to {block_table.shape[0] - 1}")


def _check_pages(
    k_cache: torch.Tensor,
    positions: torch.Tensor,
    cu_selected: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    table_rows: torch.Tensor | None,
    window: int | None,
) -> None:
    """On a CPU: the entries of the block table that queries look up are pages of the cache.

    Looked up are those of a sequence's keys up to its last one, with a window from the first that its first query sees.
    """
    sequences = seq_lens.shape[0]
    if not _checks.readable(positions, cu_selected, block_table, seq_lens, table_rows):
        return
    if 0 in (sequences, positions.shape[0], block_table.numel()):
        return
    blocks, block_size = k_cache.shape[:2]
    rows = torch.arange(sequences) if table_rows is None else table_rows.long()
    begins = cu_selected[:-1].clamp(max=positions.shape[0] - 1).long()
    first_key = torch.zeros_like(begins) if window is None else (positions[begins].long() - window + 1).clamp(min=0)
    first_page = (first_key // block_size)[:, None]
    page = torch.arange(block_table.shape[1])
    looked_up = (page >= first_page) & (page * block_size < seq_lens[:, None]) & (cu_selected.diff() > 0)[:, None]
    entries = block_table[rows.clamp(0, block_table.shape[0] - 1)]
    wrong = (looked_up & ((entries < 0) | (entries >= blocks))).nonzero()
    if wrong.shape[0]:
        s, j = wrong[0].tolist()
        raise IndexError(
            f"block_table[{rows[s]}, {j}] is {entries[s, j]}; sequence {s} has keys there, so it must be a page of "
            f"k_cache, from 0 to {blocks - 1}"
        )


def _scale(name: str, value: object, k_cache: torch.Tensor, q: torch.Tensor) -> torch.Tensor | None:
    """A cache's scale as ``[1]`` or ``[kv_heads]``."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        value = value.reshape(1)
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} is {_checks.type_of(value)}; it must be a float32 tensor [], [1] or [kv_heads] on the caches' "
            f"device: pass q.new_tensor({name}, dtype=torch.float32)"
        )
    _checks.tensor(name, value, "[1] or [kv_heads]", (torch.float32,))
    if k_cache.dtype not in FP8:
        dtype = str(k_cache.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is given and k_cache has dtype {dtype}; only float8 is scaled: leave {name} out")
    if value.shape[0] != 1:
        _checks.shape(name, value, [k_cache.shape[2]], "the number of heads of k_cache")
    _checks.same_device("q", q, **{name: value})
    _checks.unit_last_stride(**{name: value})
    return value


_LAUNCHER = "attention.sparse_query_attention_paged"
_OP = _library.define(
    pytorch.sparse_query_attention_paged,
    reference=reference.sparse_query_attention_paged,
    triton=_LAUNCHER,
    fake=lambda call: _attention.packed_results(call.q, call.return_lse),
    outputs=_attention.OUTPUTS,
)
