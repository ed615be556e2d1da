"""Attention of the selected queries to all earlier keys."""

import torch

from orthorank_kernels import _checks, _library, dispatch
from orthorank_kernels.reference import attention as reference


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
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention of selected queries, each at its own position, to the keys of all tokens.

    Query i of batch row b stands at ``p = positions[b, i] + query_offset`` on the key axis and attends to the keys j
    with ``starts[b] <= j <= p``, ``j < keys`` and, with a window, ``p - j < window``. A query that sees no key, and
    every query whose position is -1, gives exactly 0. This is the attention of a selected layer: queries of the chosen
    tokens, keys and values of every token (OrthoRank, section 3.3 and Algorithm 1).

    No [selected, keys] mask is built, and keys outside a batch row's range (before its start or first window, after its
    last position) never reach the result, whatever they hold; the reference on a GPU or inside `torch.compile`, which
    is what inputs that require grad take, asks that they be finite.

    Args:
        q: queries, float32, float16 or bfloat16 ``[batch, heads, selected, head_dim]``. Float64 runs on the reference.
        k, v: keys and values ``[batch, kv_heads, keys, head_dim]`` of the dtype of q; kv_heads divides heads, and
            consecutive query heads share a key/value head. q, k and v may have any strides whose last one is 1.
        positions: int32 ``[batch, selected]``, ascending in each row; -1 marks the unused tail.
        scale: factor on q k^T before the softmax, above 0; ``head_dim ** -0.5`` if None.
        window: how many keys a query sees at most, itself included (sliding window); None sees all.
        starts: int32 ``[batch]``, the first valid key of each row (left padding); 0 if None.
        query_offset: key index of the query axis's token 0: the number of cached keys in a chunked prefill.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``. Inputs that require grad take the reference.

    Returns:
        ``[batch, heads, selected, head_dim]``, a view of contiguous ``[batch, selected, heads, head_dim]`` memory, so
        that ``out.transpose(1, 2).reshape(batch, selected, -1)`` copies nothing.

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
    _check(q, k, v, positions, scale, window, starts, query_offset)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    args = (q, k, v, positions, scale, window, starts, query_offset)
    return dispatch.run(_OP, args, backend=backend, device=q.device)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scale: float | None,
    window: int | None,
    starts: torch.Tensor | None,
    query_offset: int,
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
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}; the heads of k must divide those of q")
    _checks.unit_last_stride(q=q, k=k, v=v)
    _checks.positions(positions, batch, q)
    _checks.shape("positions", positions, [batch, selected], "q")
    if starts is not None:
        _checks.row_index("starts", starts, batch, q)
    for name, number in (("window", window), ("query_offset", query_offset)):
        if not isinstance(number, int | torch.SymInt | None) or isinstance(number, bool):
            raise TypeError(f"{name} is {number!r}; it must be an int")
    if query_offset is None:
        raise TypeError("query_offset is None; it must be an int, 0 without a cache")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}; it must be above 0, or None for head_dim ** -0.5")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 (a query sees itself), or None for no window")


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    starts: torch.Tensor | None,
    query_offset: int,
) -> torch.Tensor:
    batch, heads, selected, head_dim = q.shape
    return q.new_empty(batch, selected, heads, head_dim).transpose(1, 2)


_LAUNCHER = "attention.sparse_query_attention"
_OP = _library.define(
    "sparse_query_attention(Tensor q, Tensor k, Tensor v, Tensor positions, float scale, SymInt? window, "
    "Tensor? starts, SymInt query_offset) -> Tensor",
    cpu=reference.sparse_query_attention,
    triton=_LAUNCHER,
    fake=_fake,
)
