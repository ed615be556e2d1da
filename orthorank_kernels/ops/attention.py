"""Attention of the selected queries to all earlier keys."""

from typing import Any

import torch

from orthorank_kernels import checks as _checks
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.ops import attention_arguments as _attention
from orthorank_kernels.pytorch import attention as pytorch
from orthorank_kernels.reference import attention as reference

MAX_OFFSET = 2**30  # a position and an offset together must fit 32 bits

TURNED = "if tensors are [batch, tokens, heads, head_dim], as in many libraries, pass x.transpose(1, 2) of q, k and v"


@planned
def sparse_query_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    starts: torch.Tensor | None = None,
    query_offset: int = 0,
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
    """Causal attention of selected queries, each at its own position, to the keys of all tokens.

    Query i of batch row b stands at ``p = positions[b, i] + query_offset`` on the key axis and attends to the keys j
    with ``starts[b] <= j <= p``, ``j < keys`` and, with a window, ``p - j < window``. A query that sees no key, and
    every query whose position is -1, gives exactly 0. This is the attention of a selected layer: queries of the chosen
    tokens, keys and values of every token (OrthoRank, section 3.3 and Algorithm 1).

    No [selected, keys] mask is built, and keys outside a batch row's range (before its start or first window, after its
    last position) never reach the result, whatever they hold; with ``backend="torch"`` on a GPU or inside
    `torch.compile`, which is what inputs that require grad take, they must be finite. Where a key or value inside that
    range is not finite, as in dense attention the row's other queries are right or NaN (0 times NaN is NaN), and
    nothing is said of queries that see it; the other rows are right.

    Args:
        q: queries, float32, float16 or bfloat16 ``[batch, heads, selected, head_dim]``. Float64 runs in PyTorch.
        k, v: keys and values ``[batch, kv_heads, keys, head_dim]`` of the dtype of q; kv_heads divides heads, and
            consecutive query heads share a key/value head. q, k and v may have any strides whose last one is 1.
        positions: int32 ``[batch, selected]``, ascending in each row; -1 marks the unused tail.
        scale: factor on q k^T before the softmax, at least 1e-10; ``head_dim ** -0.5`` if None.
        window: how many keys a query sees at most, itself included (sliding window); None sees all.
        starts: int32 ``[batch]``, the first valid key of each row (left padding); 0 if None.
        query_offset: key index of the query axis's token 0: the number of cached keys in a chunked prefill.
        softcap: above 0 and at most 1e4, or None: the logits ``s = scale * q k`` become ``softcap * tanh(s / softcap)``
            (Gemma 2).
        sinks: floating point ``[heads]``, one finite logit a head that joins the softmax's denominator alone
            (gpt-oss).
        return_lse: also return the natural logarithm of the softmax's denominator, sink included; a query that sees no
            key has -inf.
        rotary_cos, rotary_sin: tables ``[batch or 1, tokens, width]`` to rotate q by as it is read, each query by the
            row of its entry of ``positions``, as `apply_rotary_at` would before; None: q is not rotated. Floating
            point, any strides whose last one is 1.
        rotary_interleaved, rotary_dim: ``interleaved`` and ``rotary_dim`` of `apply_rotary_at`.
        out: where to write, laid out as what is returned: a tensor, or with ``return_lse`` a pair. None allocates.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``. Inputs that require grad take ``"torch"``.

    Returns:
        ``[batch, heads, selected, head_dim]``, a view of contiguous ``[batch, selected, heads, head_dim]`` memory, so
        that ``out.transpose(1, 2).reshape(batch, selected, -1)`` copies nothing. With ``return_lse`` a pair of it and
        the lse, float32 ``[batch, heads, selected]``, contiguous.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or stride, or an illegal value.
        dispatch.BackendError: the requested backend cannot run here.

    Example:
        >>> import torch
        >>> from orthorank_kernels import sparse_query_attention
        >>> q, k, v = torch.zeros(1, 2, 2, 4), torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 4).cumsum(2)
        >>> positions = torch.tensor([[0, 2]], dtype=torch.int32)  # equal scores: means of values 0..0 and 0..2
        >>> sparse_query_attention(q, k, v, positions)[0, 0, :, 0]
        tensor([1., 2.])
    """
    _check(q, k, v, positions, starts)
    _checks.integer("query_offset", query_offset, at_least=-MAX_OFFSET, at_most=MAX_OFFSET)
    _attention.check_options(q, scale, window, softcap, sinks, return_lse)
    rotary = _attention.check_rotary(q, positions, rotary_cos, rotary_sin, rotary_interleaved, rotary_dim)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    args = (q, k, v, positions, scale, window, starts, query_offset, softcap, sinks, return_lse, *rotary)
    return _attention.run(_OP, args, q, backend, return_lse, _check_out(q, out, return_lse))


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, starts: torch.Tensor | None
) -> None:
    _checks.tensor("q", q, "[batch, heads, selected, head_dim]")
    for name, value in (("k", k), ("v", v)):
        _checks.tensor(name, value, "[batch, kv_heads, keys, head_dim]")
    batch, heads, selected, head_dim = q.shape
    kv_heads = k.shape[1]
    _checks.same_dtype("q", q, k=k, v=v)
    _checks.same_device("q", q, k=k, v=v)
    _checks.shape("k", k, [batch, kv_heads, k.shape[2], head_dim], "q")
    _checks.shape("v", v, list(k.shape), "k")
    _attention.check_heads("k", kv_heads, heads, TURNED)
    _checks.unit_last_stride(q=q, k=k, v=v)
    _checks.positions(positions, batch, q)
    _checks.shape("positions", positions, [batch, selected], "q", TURNED)
    if starts is not None:
        _checks.row_index("starts", starts, batch, q)


def _check_out(
    q: torch.Tensor, out: _attention.Out, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    pair = _attention.split_out(out, return_lse)
    if pair is None:
        return None
    batch, heads, selected, head_dim = q.shape
    _checks.tensor("out", pair[0], "[batch, heads, selected, head_dim]", (q.dtype,))
    _checks.shape("out", pair[0], list(q.shape), "the op's output")
    _checks.same_device("q", q, out=pair[0])
    if not pair[0].transpose(1, 2).is_contiguous():
        raise ValueError(
            f"out has strides {list(pair[0].stride())}; it must be a view of contiguous memory in the order [batch, "
            f"selected, heads, head_dim]: torch.empty({batch}, {selected}, {heads}, {head_dim}).transpose(1, 2)"
        )
    if pair[1] is not None:
        _checks.output("out[1]", pair[1], [batch, heads, selected], torch.float32, q)
    return pair


def _fake(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, selected, head_dim = call.q.shape
    lse = call.q.new_empty((batch, heads, selected) if call.return_lse else (0,), dtype=torch.float32)
    return call.q.new_empty(batch, selected, heads, head_dim).transpose(1, 2), lse


_LAUNCHER = "attention.sparse_query_attention"
_OP = _library.define(
    pytorch.sparse_query_attention,
    reference=reference.sparse_query_attention,
    triton=_LAUNCHER,
    fake=_fake,
    outputs=_attention.OUTPUTS,
)
