"""Attention of selected queries in PyTorch: the definition of correct, and the CPU path.

Query i of batch row b stands at ``p = positions[b, i] + query_offset`` on the key axis and attends to the keys

    starts[b] <= j <= p   and   p - j < window   and   j < keys

with ``softmax(scale * q k^T) v``. A query that sees no key, and every query whose position is -1, gives exactly 0.

Blocks of selected queries meet only the keys that some query of the block sees, so memory is bounded by block x keys
and time is close to that of the needed query-key pairs. Finding those keys reads positions, which is free on a CPU. On
other devices it would wait for the device, and under tracing there is nothing to read: there every block meets all
keys, with the same result.
"""

import torch
import torch.nn.functional as F

BLOCK = 128  # queries; fewer read the keys more often, more meet keys that only the last of them sees


def sparse_query_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    starts: torch.Tensor | None,
    query_offset: int,
) -> torch.Tensor:
    """See `orthorank_kernels.sparse_query_attention`; arguments are taken as checked."""
    batch, _, selected, _ = q.shape
    if q.numel() == 0 or k.shape[2] == 0:
        return torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    reads = _may_read(positions)
    rows = range(batch) if reads else (slice(None),)
    outputs = []
    for row in rows:
        at = slice(row, row + 1) if isinstance(row, int) else row
        first_keys = None if starts is None else starts[at]
        blocks = []
        for begin in range(0, selected, BLOCK):
            queries = slice(begin, begin + BLOCK)
            seen = _visible(positions[at, queries], k.shape[2], window, first_keys, query_offset)
            keys = _key_range(*seen) if reads else slice(0, k.shape[2])
            bounds = _bounds(*seen, keys, below=window is not None or not reads, blind=not reads)
            blocks.append(_block(q[at, :, queries], k[at, :, keys], v[at, :, keys], *bounds, keys.start, scale))
        outputs.append(torch.cat(blocks, dim=1))
    return torch.cat(outputs).transpose(1, 2)


def _may_read(positions: torch.Tensor) -> bool:
    """Whether values of ``positions`` can be read at once: a real tensor, on the CPU, outside tracing."""
    return type(positions) is torch.Tensor and positions.device.type == "cpu" and not torch.compiler.is_compiling()


def _visible(
    positions: torch.Tensor, keys: int, window: int | None, starts: torch.Tensor | None, query_offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First key and end (one past the last key) that each query sees; first >= end where it sees none."""
    at = positions.long() + query_offset
    first = torch.zeros_like(at) if window is None else (at - (window - 1)).clamp(min=0)
    if starts is not None:
        first = torch.maximum(first, starts[:, None])
    first = first.clamp(max=keys)
    end = (at + 1).clamp(min=0, max=keys).masked_fill(positions < 0, 0)
    return first.int(), end.int()


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
    scale: float,
) -> torch.Tensor:
    """Attention of one block of queries ``[batch, block, heads, head_dim]``; k and v begin at key ``key_offset``."""
    if k.shape[2] == 0:
        return torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
    key = torch.arange(key_offset, key_offset + k.shape[2], device=q.device, dtype=torch.int32)
    mask = key < end[..., None]  # [batch, block, keys]
    if first is not None:
        mask = mask & (key >= first[..., None])
    grouped = False
    if q.shape[1] != k.shape[1]:  # the comparison itself is no plain bool under tracing
        grouped = True
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=grouped)
    out = out.transpose(1, 2)
    return out if blind is None else out.masked_fill(blind[..., None, None], 0.0)
