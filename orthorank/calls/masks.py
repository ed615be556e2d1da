"""Which tokens of a row are padding, read from whatever attention mask a model was called with."""

from typing import Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError, type_of

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
Columns = tuple[Tensor, Tensor]  # first valid column and the one after the last, int64 [batch] each


def valid_columns(mask: Any, columns: int, batch: int) -> Columns | None:
    """First and last-plus-one valid column of each row, or None when nothing is padding.

    Args:
        mask: ``[batch, columns]`` (1 = token), a causal mask ``[batch, 1, queries, keys]`` (bool, or float with 0 =
            visible), a dict of such by layer type, or None.
        columns: columns that exist so far: cached tokens and the tokens of this call. batch: rows of the call.

    Raises:
        OrthoRankError: the mask is of another kind, or has holes.
    """
    mask = _full_attention(mask)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = f" of shape {list(mask.shape)}" if isinstance(mask, Tensor) else ""
        raise OrthoRankError(
            f"attention_mask is {type_of(mask)}{shape}, from which padding cannot be read while a plan is "
            "applied; pass a [batch, tokens] mask with 1 for tokens and 0 for padding"
        )
    if mask.shape[0] not in (1, batch):
        raise OrthoRankError(f"attention_mask has {mask.shape[0]} rows and the call {batch}; give one row for each")
    visible = _visible(mask) if mask.dim() == 4 else None
    mask = mask != 0 if visible is None else visible[:, -1]  # the last query sees every valid column up to its own
    mask = mask[:, :columns]
    if mask.shape[1] != columns:
        raise OrthoRankError(
            f"attention_mask covers {mask.shape[1]} tokens; it must cover all {columns}, cached ones included"
        )
    nothing_padded = _answers(mask) and bool(mask.all())  # a graph is the same for every mask
    found = None if nothing_padded else _contiguous(mask)
    if visible is not None:
        _check_causal(visible[:, :, :columns], found)
    return found


def _visible(mask: Tensor) -> Tensor:
    """Bool ``[batch, queries, keys]`` of a causal mask ``[batch, heads, queries, keys]``."""
    first_head = mask[:, 0]
    return first_head if mask.dtype == torch.bool else first_head == 0


def _check_causal(visible: Tensor, columns: Columns | None) -> None:
    """A mask of which the last query was read says the same of all others: plain causal attention with padding.

    Block-diagonal (packed), prefix and sliding masks do not; their rows begin elsewhere than the last query shows.
    """
    queries, keys = visible.shape[1:]
    key = torch.arange(keys, device=visible.device)
    query = key[keys - queries :, None]
    expected, padding = (key <= query)[None], torch.zeros_like(query, dtype=torch.bool)[None]
    if columns is not None:
        start, end = (c[:, None, None] for c in columns)
        expected = expected & (key >= start) & (key < end)
        padding = (query < start) | (query >= end)
    # What a padding query sees changes no result; some masks let it see everything, lest its softmax be NaN.
    right = (visible == expected).all(-1) | (visible.all(-1) & padding.squeeze(-1))
    if _any(~right):
        raise OrthoRankError(
            "attention_mask is a [batch, heads, queries, keys] mask that is not causal attention with padding (packed "
            "sequences, a prefix or a sliding window), so the rows cannot be read from it; pass a [batch, tokens] mask "
            "with 1 for tokens and 0 for padding, one sequence a row"
        )


def _full_attention(mask: Any) -> Any:
    """The full-attention mask of a dict by layer type: a sliding one does not show where a row begins."""
    if not isinstance(mask, dict):
        return mask
    if "full_attention" not in mask:
        raise OrthoRankError(
            f"attention_mask holds only {', '.join(map(repr, mask))}, from which padding cannot be read; "
            "pass a [batch, tokens] mask with 1 for tokens and 0 for padding"
        )
    return mask["full_attention"]


def _answers(values: Tensor) -> bool:
    """Whether there are values to ask, as there are none in a graph, under FakeTensorMode and on "meta"."""
    if torch.compiler.is_compiling() or values.is_meta:
        return False
    if values.is_cuda and torch.cuda.is_current_stream_capturing():  # the host may not wait there
        return False
    return type(values) is Tensor or not isinstance(values, torch._subclasses.FakeTensor)


def _any(wrong: Tensor) -> bool:
    """Whether any is True. A compiled graph asks no questions: it stops there at run time, with fewer words."""
    if _answers(wrong):
        return bool(wrong.any())
    if not torch.compiler.is_compiling():  # a fake or a meta tensor has no wrong mask, and a capture cannot see one
        return False
    torch._assert_async(~wrong.any(), "attention_mask or position_ids are not those of padded rows, one sequence each")
    return False


def _contiguous(mask: Tensor) -> Columns:
    count = mask.sum(dim=1)
    start = mask.to(torch.int8).argmax(dim=1)  # 0 for a row without tokens
    end = start + count
    index = torch.arange(mask.shape[1], device=mask.device)
    filled = (index >= start[:, None]) & (index < end[:, None])
    if _any(filled != mask):
        rows = (filled != mask).any(dim=1).nonzero().flatten().tolist()
        raise OrthoRankError(
            f"attention_mask has holes in row {rows[0]}; with a plan applied the tokens of a row must be contiguous "
            "(padding on the left or on the right, not between tokens)"
        )
    return torch.where(count > 0, start, mask.shape[1]), torch.where(count > 0, end, mask.shape[1])


def refuse_packed(kwargs: dict[str, Any]) -> None:
    """Several sequences in one row have several sinks: refuse them by name."""
    if named := [name for name in PACKED if kwargs.get(name) is not None]:
        raise OrthoRankError(
            f"{', '.join(named)} was given: packed sequences (several in one row) are not supported while a plan is "
            "applied; pass one sequence a row, padded, with a [batch, tokens] attention_mask"
        )


def refuse_restarts(positions: Any, columns: Columns | None, past: int) -> None:
    """Positions that do not go up by one from token to token of a row: several sequences in it, each with a sink.

    Args:
        positions: position_ids of the call, ``[batch or 1, tokens]``, or None.
        columns: what is padding, as `valid_columns` gives it; past: columns before the call.
    """
    if not isinstance(positions, Tensor) or positions.shape[-1] < 2:
        return
    wrong = positions.diff(dim=-1) != 1
    if columns is not None:
        start, end = (c.to(positions.device)[:, None] for c in columns)
        column = torch.arange(past, past + positions.shape[-1], device=positions.device)
        wrong = wrong & (column[:-1] >= start) & (column[1:] < end)
    if _any(wrong):
        raise OrthoRankError(
            "position_ids restart or jump inside a row: packed sequences (several in one row) are not supported while "
            "a plan is applied; pass one sequence a row, padded, with a [batch, tokens] attention_mask"
        )


def refuse_right_padding(columns: Columns, total: int) -> None:
    """A prompt of `generate()` whose generated tokens are ranked ends at the last column, where they go on.

    Args:
        columns: what is padding, as `valid_columns` gives it; total: columns so far.
    """
    start, end = columns
    wrong = (end < total) & (end > start)
    if _any(wrong):
        rows = wrong.nonzero().flatten().tolist()
        raise OrthoRankError(
            f"row {rows[0]} of the prompt has padding on the right, and the plan says decode='threshold': generated "
            "tokens would stand behind the padding, which selected layers cannot leave out between tokens; pad on the "
            "left (tokenizer.padding_side = 'left'), or use a plan with decode='dense'"
        )
