"""One call of the model, seen by the selected layers: what is prompt, what is padding, where the sinks are.

Columns count the tokens of a row from its first one ever given, padding included: the cached ones, then those of this
call. A call is a *prefill* as far as its tokens belong to the prompt, and *decode* beyond it. Decode tokens are dense.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orthorank.config import OrthoRankConfig
from orthorank.masks import Columns, refuse_packed, valid_columns
from orthorank_kernels import keep_count


@dataclass
class Phase:
    """What the caller said of the calls to come; see `Handle.decoding`, `Handle.prefilling` and `generate()`.

    Args:
        prompt: columns that are prompt; None: every multi-token call is prefill.
        keep_last: tokens at the prompt's end that are always updated.
        padding_mask: the ``[batch, columns]`` mask that `generate()` was about to turn into another kind.
    """

    prompt: int | None = None
    keep_last: int = 0
    padding_mask: Tensor | None = None


@dataclass
class Call:
    """What the selected layers need to know of one call. Tensors are int32 ``[batch]`` on the model's device.

    Args:
        batch, tokens: shape of the call; past: tokens in the cache before it.
        forced: how many tokens at the end of each row are updated whatever their score.
        decode_tokens: how many tokens at the end of the call are no prompt: all updated, beyond the count.
        starts: first valid token of each row inside the call, lengths: how many; None without padding.
        key_starts: first valid column of each row; None without padding.
        sink_positions: the sink's index inside the call, -1 where it was in an earlier one; None: the first token.
    """

    batch: int
    tokens: int
    past: int
    forced: int
    decode_tokens: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    key_starts: Tensor | None = None
    sink_positions: Tensor | None = None
    _counts: dict[float, tuple[int | Tensor, int]] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether nothing came before this call, so that every row's sink is in it (or not yet anywhere)."""
        return self.past == 0

    def counts(self, config: OrthoRankConfig) -> tuple[int | Tensor, int]:
        """How many tokens of each row are updated (an int without padding), and the most that any row can have."""
        if config.keep_ratio not in self._counts:
            kept = self.forced - self.decode_tokens
            most = keep_count(self.tokens - self.decode_tokens, config.keep_ratio, kept) + self.decode_tokens
            each: int | Tensor = most
            if self.lengths is not None:
                prompt = (self.lengths - self.decode_tokens).clamp(min=0)
                each = keep_count(prompt, config.keep_ratio, kept) + self.decode_tokens
                each = torch.where(self.lengths > 0, each, torch.zeros_like(self.lengths))
            self._counts[config.keep_ratio] = (each, most)
        return self._counts[config.keep_ratio]

    def tokens_in(self) -> int | Tensor:
        """Valid tokens of the call."""
        return self.batch * self.tokens if self.lengths is None else self.lengths.sum()

    def tokens_updated(self, config: OrthoRankConfig) -> int | Tensor:
        """Tokens that a selected layer updates in this call."""
        each, _ = self.counts(config)
        return each.sum() if isinstance(each, Tensor) else self.batch * each


def read_call(hidden_shape: tuple[int, int], device: torch.device, phase: Phase, kwargs: dict[str, Any]) -> Call | None:
    """The call that ``kwargs`` of the decoder's forward describe, or None when it only decodes.

    Args:
        hidden_shape: batch and tokens of the call.
        phase: what the caller said before.
    """
    batch, tokens = hidden_shape
    past = _past(kwargs.get("past_key_values"), phase, tokens)
    prompt_tokens = _prompt_tokens(phase, past, tokens)
    if prompt_tokens <= 0:
        return None
    refuse_packed(kwargs)
    ends_prompt = phase.prompt is None or past + tokens >= phase.prompt
    decode_tokens = tokens - prompt_tokens
    call = Call(batch, tokens, past, (phase.keep_last if ends_prompt else 0) + decode_tokens, decode_tokens)
    mask = kwargs.get("attention_mask")
    if phase.padding_mask is not None and phase.padding_mask.shape == (batch, past + tokens):
        mask = phase.padding_mask
    columns = valid_columns(mask, past + tokens)
    if columns is not None:
        _add_padding(call, columns, device)
    elif not call.first:
        call.sink_positions = torch.full((batch,), -1, dtype=torch.int32, device=device)
    return call


def _past(cache: Any, phase: Phase, tokens: int) -> int:
    """Columns before this call. The mask of `generate()` covers all columns; a static cache would have to be read."""
    if cache is None:
        return 0
    if phase.padding_mask is not None:
        return phase.padding_mask.shape[1] - tokens
    return int(cache.get_seq_length())


def _prompt_tokens(phase: Phase, past: int, tokens: int) -> int:
    """How many of the call's tokens are prompt. A single token over a filled cache is a decode step."""
    if phase.prompt is not None:
        return min(tokens, phase.prompt - past)
    return 0 if past > 0 and tokens == 1 else tokens


def _add_padding(call: Call, columns: Columns, device: torch.device) -> None:
    start, end = (c.to(device) for c in columns)
    first = (start - call.past).clamp(0, call.tokens)
    last = (end - call.past).clamp(0, call.tokens)
    call.lengths = (last - first).clamp(min=0).int()
    call.starts = first.clamp(max=call.tokens - 1).int()  # a row without tokens may name any of them: its length is 0
    call.key_starts = start.int()
    here = (start >= call.past) & (start < call.past + call.tokens)
    call.sink_positions = torch.where(here, start - call.past, -1).int()


@contextmanager
def phase_of(holder: Any, phase: Phase) -> Iterator[None]:
    """Inside, calls of the model are read by ``phase``."""
    before, holder.phase = holder.phase, phase
    try:
        yield
    finally:
        holder.phase = before
