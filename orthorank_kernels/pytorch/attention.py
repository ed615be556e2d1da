"""Attention of selected queries in PyTorch.

A query at key ``p`` attends to the keys

    first <= j <= p   and   p - j < window   and   j < keys

with the logits ``s_j = scale * q k_j``, or ``softcap * tanh(s_j / softcap)``. With a sink logit ``z`` of its head,

    out = sum_j exp(s_j) v_j / (exp(z) + sum_j exp(s_j)),   lse = log(exp(z) + sum_j exp(s_j))

and without one, ``exp(z)`` is not there. A query that sees no key, and every query whose position is -1, gives exactly
0, and an lse of -inf, with a sink too.

Every layout comes down to two numbers for a query, the first key and the end of the keys that it sees, and to a way to
read a range of keys. Blocks of selected queries meet only the keys that some query of the block sees, so memory is
bounded by block x keys and time is close to that of the needed query-key pairs. Finding those keys reads positions,
which is free on a CPU. On other devices it would wait for the device, and under tracing there is nothing to read:
there every block meets all keys, with the same result.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from orthorank_kernels.pytorch.rotary import apply_rotary_at

BLOCK = 128  # queries; fewer read the keys more often, more meet keys that only the last of them sees
ROWS = 1024  # queries times heads where the scores themselves are held

Pair = tuple[torch.Tensor, torch.Tensor]


class Options(NamedTuple):
    """What turns scores into results; see `orthorank_kernels.sparse_query_attention`."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    return_lse: bool

    @property
    def plain(self) -> bool:
        """Whether torch's fused attention computes it."""
        return self.softcap is None and self.sinks is None and not self.return_lse


def sparse_query_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    starts: torch.Tensor | None,
    query_offset: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Pair:
    """See `orthorank_kernels.sparse_query_attention`; arguments are taken as checked."""
    q = rotated(q, positions, rotary_cos, rotary_sin, rotary_interleaved, rotary_dim)
    batch, keys = q.shape[0], k.shape[2]
    options = Options(scale, softcap, sinks, return_lse)
    if q.numel() == 0 or keys == 0:
        out, lse = nothing(q, return_lse)
        return out.transpose(1, 2), batch_lse(lse)
    reads = may_read(positions)
    rows = range(batch) if reads else (slice(None),)
    results = []
    for row in rows:
        at = slice(row, row + 1) if isinstance(row, int) else row
        first_keys = None if starts is None else starts[at]
        first, end = visible(positions[at], keys, window, first_keys, query_offset)

        def fetch(part: slice, at: slice = at) -> Pair:
            return k[at, :, part], v[at, :, part]

        results.append(attend(q[at], first, end, keys, fetch, options, below=window is not None, reads=reads))
    out, lse = joined(results, 0)
    return out.transpose(1, 2), batch_lse(lse)


def rotated(
    q: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    rotary_dim: int | None,
) -> torch.Tensor:
    """Queries ``[batch, heads, selected, head_dim]`` or ``[n, heads, head_dim]``, rotated if there are tables."""
    if cos is None or sin is None:
        return q
    if q.dim() == 4:
        return apply_rotary_at(q, cos, sin, positions, interleaved, rotary_dim)
    turned = apply_rotary_at(q.transpose(0, 1)[None], cos[None], sin[None], positions[None], interleaved, rotary_dim)
    return turned[0].transpose(0, 1)


def batch_lse(lse: torch.Tensor) -> torch.Tensor:
    """``[batch, selected, heads]`` as the public op returns it, ``[batch, heads, selected]``."""
    return lse.transpose(1, 2).contiguous() if lse.dim() == 3 else lse


def joined(results: list[Pair], dim: int) -> Pair:
    """The results of parts, in order along ``dim``, as one; each lse is as `attend` returns it."""
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, dim), torch.cat(lses, min(dim, lses[0].dim() - 1))


def nothing(q: torch.Tensor, return_lse: bool) -> Pair:
    """What queries ``[batch, heads, selected, head_dim]`` give that see no key, as `attend` returns it."""
    batch, heads, selected, dim = q.shape
    shape = (batch, selected, heads) if return_lse else (0,)
    return q.new_zeros(batch, selected, heads, dim), q.new_full(shape, float("-inf"), dtype=torch.float32)


def may_read(*tensors: torch.Tensor) -> bool:
    """Whether values of these can be read at once: real tensors, on the CPU, outside tracing."""
    return not torch.compiler.is_compiling() and all(
        type(x) is torch.Tensor and x.device.type == "cpu" for x in tensors
    )


def visible(
    positions: torch.Tensor, keys: int | torch.Tensor, window: int | None, starts: torch.Tensor | None, offset: int = 0
) -> Pair:
    """First key and end (one past the last key) that each query sees; first >= end where it sees none.

    Args:
        positions: ``[batch, selected]``; keys: how many there are, one number or one for each query.
    """
    at = positions.long() + offset
    first = torch.zeros_like(at) if window is None else (at - (window - 1)).clamp(min=0)
    if starts is not None:
        first = torch.maximum(first, starts[:, None])
    if isinstance(keys, torch.Tensor):
        first, end = torch.minimum(first, keys), torch.minimum(at + 1, keys).clamp(min=0)
    else:
        first, end = first.clamp(max=keys), (at + 1).clamp(min=0, max=keys)
    return first.int(), end.masked_fill(positions < 0, 0).int()


def attend(
    q: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    keys: int,
    fetch: Callable[[slice], Pair],
    options: Options,
    *,
    below: bool,
    reads: bool,
) -> Pair:
    """Attention of queries ``[batch, heads, selected, head_dim]`` to the keys ``first .. end`` of each, in blocks.

    Args:
        first, end: int32 ``[batch, selected]``.
        keys: how many keys there are; fetch: gives a range of them and of the values, ``[batch, kv_heads, range, D]``.
        below: whether first keys differ between queries.
        reads: whether ``first`` and ``end`` may be read, to fetch only keys that some query sees.

    Returns:
        ``[batch, selected, heads, head_dim]``, and the lse ``[batch, selected, heads]`` or an empty tensor.
    """
    block = BLOCK if options.plain else max(1, min(BLOCK, ROWS // max(1, q.shape[1])))
    results = []
    for begin in range(0, q.shape[2], block):
        queries = slice(begin, begin + block)
        part = q[:, :, queries]
        seen = first[:, queries], end[:, queries]
        range_ = _key_range(*seen) if reads else slice(0, keys)
        if reads and range_.start == range_.stop:
            results.append(nothing(part, options.return_lse))
            continue
        k, v = fetch(range_)
        bounds = _bounds(*seen, range_, below=below or not reads, blind=not reads)
        results.append(_block(part, k, v, *bounds, range_.start, options))
    return joined(results, 1) if results else nothing(q, options.return_lse)


def _key_range(first: torch.Tensor, end: torch.Tensor) -> slice:
    """The keys that some query sees; empty when none sees any."""
    sees = first < end
    if not bool(sees.any()):
        return slice(0, 0)
    return slice(int(first[sees].min()), int(end[sees].max()))


def _bounds(
    first: torch.Tensor, end: torch.Tensor, keys: slice, *, below: bool, blind: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """What a block's mask must say: first keys (None: all of its keys are late enough), ends, and the blind queries.

    A softmax over nothing is NaN, in the gradient too, so a blind query attends to everything and is then set to 0.
    """
    none = first >= end
    if not blind and not bool(none.any()):
        return first if below else None, end, None
    first, end = first.masked_fill(none, 0), end.masked_fill(none, keys.stop)
    return first if below else None, end, none


def _block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor | None,
    end: torch.Tensor,
    blind: torch.Tensor | None,
    key_offset: int,
    options: Options,
) -> Pair:
    """Attention of one block of queries ``[batch, heads, block, head_dim]``; k and v begin at key ``key_offset``."""
    key = torch.arange(key_offset, key_offset + k.shape[2], device=q.device, dtype=torch.int32)
    mask = key < end[..., None]  # [batch, block, keys]
    if first is not None:
        mask = mask & (key >= first[..., None])
    if options.plain:
        grouped = False
        if q.shape[1] != k.shape[1]:  # the comparison itself is no plain bool under tracing
            grouped = True
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None], scale=options.scale, enable_gqa=grouped
        ).transpose(1, 2)
        lse = q.new_empty(0, dtype=torch.float32)
    else:
        out, lse = _with_scores(q, k, v, mask, options)
    if blind is not None:
        out = out.masked_fill(blind[..., None, None], 0.0)
        lse = lse.masked_fill(blind[..., None], float("-inf")) if options.return_lse else lse
    return out, lse


def _with_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, options: Options) -> Pair:
    """What torch's fused attention leaves out: soft-capping, sink logits and the log-sum-exp; sums in float32."""
    batch, heads, block, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).reshape(batch, kv_heads, heads // kv_heads * block, dim)
    scores = (rows @ k.to(wide).mT).view(batch, heads, block, keys) * options.scale
    if options.softcap is not None:
        scores = (scores / options.softcap).tanh() * options.softcap
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    lse = scores.logsumexp(-1)  # [batch, heads, block]
    if options.sinks is not None:
        lse = torch.logaddexp(lse, options.sinks.to(wide)[:, None])
    weights = (scores - lse[..., None]).exp()
    out = weights.view(batch, kv_heads, heads // kv_heads * block, keys) @ v.to(wide)
    out = out.view(batch, heads, block, dim).transpose(1, 2).to(q.dtype)
    return out, lse.transpose(1, 2).float() if options.return_lse else q.new_empty(0, dtype=torch.float32)
