"""Memory layouts of outputs."""

import torch

SCORE_BINS = 1024  # of the histogram of a long row's scores, in the workspace of `rms_norm_select`
# Tokens; `rms_norm_select` has longer rows counted: more than fit its registers, with the three before the first valid
# one with which reading may begin.
LONG_ROW = 2048 - 3


def empty_ordered_like(x: torch.Tensor) -> torch.Tensor:
    """A new dense tensor with the shape of ``x`` and its dimensions in the same order in memory.

    So a transposed view gives a transposed view, and a slice of a fused projection gives a tensor without the gaps.
    (`torch.empty_like` gives up on inputs with gaps and returns them in the order of their dimensions.)

    >>> x = torch.empty(2, 5, 3, 4).transpose(1, 2)[..., :2]
    >>> empty_ordered_like(x).stride()
    (30, 2, 6, 1)
    """
    order: list[int] = []
    for dim in range(x.dim() - 1):  # insertion, because `sorted` cannot be traced when strides are symbolic
        place = len(order) if x.stride(dim) > 0 else 0  # an expanded dimension has no place in memory: outermost
        while place > 0 and x.stride(order[place - 1]) < x.stride(dim):
            place -= 1
        order.insert(place, dim)
    order.append(x.dim() - 1)
    return torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device)


def norm_outputs(
    hidden_states: torch.Tensor, residual: torch.Tensor | None, norm: str, write_norm: bool, copy_input: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New tensors for what the norm with score writes: normed, scores, the summed (or copied) hidden states.

    What is not written gets an empty tensor, because an operator returns tensors.
    """

    def states(wanted: bool) -> torch.Tensor:
        return hidden_states.new_empty(hidden_states.shape if wanted else 0)

    scores = hidden_states.new_empty(hidden_states.shape[:-1], dtype=torch.float32)
    return states(write_norm and norm != "identity"), scores, states(residual is not None or copy_input)


def selection_outputs(like: torch.Tensor, width: int, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """New tensors for what a selection writes: positions, counts, rows, cu_selected.

    The last two are empty in the batch layout, because an operator returns tensors. ``like`` is ``[batch, ...]`` there.
    """

    def integers(*shape: int) -> torch.Tensor:
        return like.new_empty(shape, dtype=torch.int32)

    if cu_seqlens is None:
        return integers(like.shape[0], width), integers(like.shape[0]), integers(0), integers(0)
    sequences = cu_seqlens.shape[0] - 1
    return integers(width), integers(sequences), integers(width), integers(sequences + 1)


def selection_workspace(rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Zeros for `rms_norm_select` of a batch: one for each row, and of long rows room for the histogram of the scores.

    >>> [selection_workspace(2, tokens, torch.device("cpu")).shape[0] for tokens in (2045, 2046)]
    [2, 2050]
    """
    entries = 1 + SCORE_BINS if tokens > LONG_ROW else 1
    return torch.zeros(rows * entries, dtype=torch.int32, device=device)
