"""Attention of the selected queries of packed sequences to all of their earlier keys."""

from typing import Any

import torch

from orthorank_kernels import checks as _checks
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.ops import attention_arguments as _attention
from orthorank_kernels.pytorch import attention_varlen as pytorch
from orthorank_kernels.reference import attention as reference


@planned
def sparse_query_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cu_selected: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_dim: int | None = None,
    out: _attention.Out = None,
    backend: str = "auto",
) -> Any:
    """Causal attention of selected queries, each at its own position, over sequences that lie one after another.

    Sequence s owns the queries ``cu_selected[s] .. cu_selected[s + 1]`` and the keys ``cu_seqlens_k[s] ..
    cu_seqlens_k[s + 1]``. Query i stands at key ``positions[i]`` of its sequence and attends to the keys j of it with
    ``j <= positions[i]`` and, with a window, ``positions[i] - j < window``. A query that sees no key, every query whose
    position is -1 and every query past ``cu_selected[-1]`` gives exactly 0. Scores: see `sparse_query_attention`.

    Both ``cu_selected`` and ``cu_seqlens_k`` start at 0 and never fall; their values stay on the device, so a captured
    graph serves any split of n queries. Sequences may be empty, and may have no selected query. One sequence's keys
    never reach another's result.

    Args:
        q: queries, float32, float16 or bfloat16 ``[n, heads, head_dim]``. Float64 runs in PyTorch.
        k, v: keys and values ``[total_k, kv_heads, head_dim]`` of the dtype of q; kv_heads divides heads, and
            consecutive query heads share a key/value head. q, k and v may have any strides whose last one is 1.
        positions: int32 ``[n]``, ascending in each sequence, counted from the sequence's first key.
        cu_selected: int32 ``[seqs + 1]``, as `select_tokens` returns it.
        cu_seqlens_k: int32 ``[seqs + 1]``.
        max_seqlen_k: keys of the longest sequence or more, known on the host: how far few queries are split over the
            keys. None takes total_k. A smaller number is an error on a CPU; on a GPU results are undefined.
        scale: factor on q k^T before the softmax, at least 1e-10; ``head_dim ** -0.5`` if None.
        window: how many keys a query sees at most, itself included (sliding window); None sees all.
        softcap: above 0 and at most 1e4, or None: the logits ``s = scale * q k`` become ``softcap * tanh(s / softcap)``
            (Gemma 2).
        sinks: floating point ``[heads]``, one finite logit a head that joins the softmax's denominator alone
            (gpt-oss).
        return_lse: also return the natural logarithm of the softmax's denominator, sink included; a query that sees no
            key has -inf.
        rotary_cos, rotary_sin: tables ``[tokens, width]`` to rotate q by as it is read, each query by the
            row of its entry of ``positions``, as `apply_rotary_at` would before; None: q is not rotated. Floating
            point, any strides whose last one is 1.
        rotary_interleaved, rotary_dim: ``interleaved`` and ``rotary_dim`` of `apply_rotary_at`.
        out: where to write, shape and dtype of ``q``, contiguous; with ``return_lse`` a pair. None allocates.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``. Inputs that require grad take ``"torch"``.

    Returns:
        ``[n, heads, head_dim]``, contiguous. With ``return_lse`` a pair of it and the lse, float32 ``[n, heads]``.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or stride, or an illegal value.
        dispatch.BackendError: the requested backend cannot run here.

    Example:
        >>> import torch
        >>> q, k = torch.zeros(3, 2, 4), torch.zeros(5, 1, 4)  # equal scores: means of the values seen
        >>> v = torch.arange(5.0)[:, None, None].expand(5, 1, 4).contiguous()
        >>> positions = torch.tensor([0, 2, 1], dtype=torch.int32)  # of sequence 0 (keys 0..2) and 1 (keys 3..4)
        >>> cu_selected, cu_seqlens_k = torch.tensor([[0, 2, 3], [0, 3, 5]], dtype=torch.int32)
        >>> sparse_query_attention_varlen(q, k, v, positions, cu_selected, cu_seqlens_k)[:, 0, 0]
        tensor([0.0000, 1.0000, 3.5000])
    """
    _check(q, k, v, positions, cu_selected, cu_seqlens_k)
    _attention.check_longest(max_seqlen_k, cu_selected, boundaries=cu_seqlens_k)
    _attention.check_options(q, scale, window, softcap, sinks, return_lse)
    rotary = _attention.check_rotary(q, positions, rotary_cos, rotary_sin, rotary_interleaved, rotary_dim)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    indices = (positions, cu_selected, cu_seqlens_k, max_seqlen_k)
    args = (q, k, v, *indices, scale, window, softcap, sinks, return_lse, *rotary)
    return _attention.run(_OP, args, q, backend, return_lse, _attention.packed_out(q, out, return_lse))


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cu_selected: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> None:
    _checks.tensor("q", q, "[n, heads, head_dim]")
    for name, value in (("k", k), ("v", v)):
        _checks.tensor(name, value, "[total_k, kv_heads, head_dim]")
    _checks.same_dtype("q", q, k=k, v=v)
    _checks.same_device("q", q, k=k, v=v)
    _checks.shape("k", k, [k.shape[0], k.shape[1], q.shape[2]], "q")
    _checks.shape("v", v, list(k.shape), "k")
    _attention.check_heads("k", k.shape[1], q.shape[1])
    _checks.unit_last_stride(q=q, k=k, v=v)
    _attention.check_packed(q, positions, cu_selected)
    _attention.check_index("cu_seqlens_k", cu_seqlens_k, "[seqs + 1]", q, cu_selected.shape[0], "cu_selected")
    _checks.boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0], "k")


_LAUNCHER = "attention.sparse_query_attention_varlen"
_OP = _library.define(
    pytorch.sparse_query_attention_varlen,
    reference=reference.sparse_query_attention_varlen,
    triton=_LAUNCHER,
    fake=lambda call: _attention.packed_results(call.q, call.return_lse),
    outputs=_attention.OUTPUTS,
)
