"""A warning for batches that look padded and say nothing of it: with a plan the pads would be ranked as tokens."""

import warnings
from typing import Any

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels.callers import levels_to_caller

FEW = 4  # equal tokens at a row's end that text hardly has, where they are not the model's padding token


class Watch:
    """Looks at calls without an attention mask, until it has warned once.

    A dense causal model does not care what follows a row's last token; top-k does: it counts pads and selects some.
    On a CPU every call is looked at; elsewhere only the first one, since the answer has to be waited for.
    """

    def __init__(self) -> None:
        self.done = False

    def __call__(self, given: Tensor, config: Any) -> None:
        """``given``: ids ``[batch, tokens]`` or embeddings ``[batch, tokens, hidden]`` of a call without a mask."""
        if self.done or given.shape[1] < 2 or not _checks.readable(given.detach(), anywhere=True):
            return
        if given.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self.done = given.device.type != "cpu"
        row = _padded_row(given, config)
        if row is None:
            return
        self.done = True
        where, length = row
        warnings.warn(
            f"a model with a plan applied was called without an attention mask, and row {where} ends in {length} equal "
            "tokens: if they are padding, pass attention_mask ([batch, tokens], 1 for tokens and 0 for padding); "
            "otherwise the plan ranks them as tokens, and the row gets other values than alone. If they are text, all "
            "is well; this is said once",
            stacklevel=levels_to_caller(),
        )


def _padded_row(given: Tensor, config: Any) -> tuple[int, int] | None:
    """The first row that ends in padding by the looks of it, and in how many tokens of it."""
    rows = given[:, :, None] if given.dim() == 2 else given
    same = (rows == rows[:, -1:]).all(dim=-1)  # [batch, tokens]
    lengths = same.flip(1).int().cumprod(dim=1).sum(dim=1)
    least = torch.full_like(lengths, FEW)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and given.dim() == 2:
        ends = getattr(config, "eos_token_id", None)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        least = torch.where(given[:, -1] == pad, 2 if pad in ends else 1, least)
    wrong = (lengths >= least) & (lengths < given.shape[1])  # a row of one token alone is no text with padding
    if not bool(wrong.any()):
        return None
    where = int(wrong.int().argmax())
    return where, int(lengths[where])
