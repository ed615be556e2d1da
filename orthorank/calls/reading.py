"""A call of the decoder's forward, read from its arguments and from what the caller said before."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthorank.calls.context import ForwardContext
from orthorank.calls.masks import Columns, refuse_packed, refuse_restarts, refuse_right_padding, valid_columns
from orthorank.common.errors import OrthoRankError


@dataclass
class Phase:
    """What the caller said of the calls to come; see `Handle.decoding`, `prefilling`, `context` and `generate()`.

    Args:
        prompt: columns that are prompt; None: every multi-token call is prefill.
        keep_last: tokens at the prompt's end that are always updated.
        padding_mask: the ``[batch, columns]`` mask that `generate()` was about to turn into another kind.
        unpadded: whether `generate()` had no mask, so that the one it makes shows no padding, only windows.
        decodes: whether the next call is known to hold generated tokens alone; what a compiled graph goes by.
        any_cache: whether a cache may be continued that another plan, or none, has filled.
        context: tokens of each row (or one number for all) that are prompt, counted from the row's first; the others
            are decoded. None: ``prompt`` says.
        given: columns that `generate()` hands to the next call; None: it has prepared none.
        prepared: whether `generate()` has prepared the next call; None: it has prepared no call yet.
        cache: that of the last call that it prepared, or None.
        added: columns that came before the prompt of `generate()` afterwards.
    """

    prompt: int | None = None
    keep_last: int = 0
    padding_mask: Tensor | None = None
    unpadded: bool = False
    decodes: bool = False
    any_cache: bool = False
    context: tuple[int, ...] | None = None
    given: int | None = None
    prepared: bool | None = None
    cache: Any = None
    added: int = 0

    @property
    def prompt_end(self) -> int | None:
        """Where the prompt ends, among all columns; None: not said."""
        return None if self.prompt is None else self.prompt + self.added


def context_lengths(lengths: int | Sequence[int] | Tensor) -> tuple[int, ...]:
    """``lengths`` of `orthorank.context`, one for each row or one for all.

    >>> context_lengths([3, 4])
    (3, 4)
    """
    given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    numbers = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not numbers or not all(type(number) is int and number > 0 for number in numbers):
        raise OrthoRankError(
            f"lengths is {given!r}; it must be the number of context tokens, 1 or more, or a list of one for each row"
        )
    return tuple(numbers)


@contextmanager
def phase_of(holder: Any, phase: Phase) -> Iterator[None]:
    """Inside, calls of the model are read by ``phase``."""
    with holder.lock:  # another thread's calls would be read by this phase, too
        before, holder.phase = holder.phase, phase
        try:
            yield
        finally:
            holder.phase = before


def read_call(
    shape: tuple[int, int],
    device: torch.device,
    phase: Phase,
    kwargs: dict[str, Any],
    decode: str = "dense",
    sinks: bool = False,
    min_prompt: int = 0,
) -> ForwardContext:
    """The call that ``kwargs`` of the decoder's forward describe.

    Args:
        shape: batch and tokens of the call.
        phase: what the caller said before; decode: what the plan says of generated tokens.
        sinks: whether it has to be known where sinks and padding are in calls of generated tokens alone, too.
        min_prompt: the plan's; rows with fewer tokens in their prompts are dense.
    """
    batch, tokens = shape
    refuse_packed(kwargs)
    cache = cache_of(kwargs)
    if torch.compiler.is_compiling() and decode == "dense" and _decodes_over_tensors(cache, phase, tokens):
        # How much more came before, dense layers do not ask.
        call = ForwardContext(batch, tokens, past=1, prompt_tokens=0)
        return _placed(call, None, device) if sinks else call
    past = _past(cache, phase, tokens)
    ranks_decoded = decode == "threshold"
    call = ForwardContext(batch, tokens, past, _prompt_tokens(phase, past, tokens, ranks_decoded), ranks_decoded)
    if call.decodes_only:
        if not sinks:
            return call
        if phase.prompt and not call.first:  # in generate() every row has begun with the prompt
            return _placed(call, None, device)
        return _placed(call, valid_columns(_mask(phase, kwargs, batch, past + tokens), past + tokens, batch), device)
    if phase.prompt_end is None or past + tokens >= phase.prompt_end:
        call = dataclasses.replace(call, keep_last=min(phase.keep_last, call.prompt_tokens))
    columns = valid_columns(_mask(phase, kwargs, batch, past + tokens), past + tokens, batch)
    if ranks_decoded and phase.prompt and columns is not None:
        refuse_right_padding(columns, past + tokens)
    refuse_restarts(kwargs.get("position_ids"), columns, past)
    if phase.context is not None and (call.keep_last or not ranks_decoded):
        short = [length < min_prompt for length in phase.context]
        if any(short) and columns is None:
            columns = _all_columns(call, device)
        call = _with_context(call, columns, phase.context, device)
        if all(short):
            return dataclasses.replace(call, prompt_tokens=0, keep_last=0, tails=None, keeps=None, short=True)
        return _with_short(call, torch.tensor(short, device=device).expand(batch)) if any(short) else call
    end = phase.prompt_end or past + tokens
    if min_prompt and end < min_prompt:  # and so is every row, which has at most as many
        return _placed(dataclasses.replace(call, prompt_tokens=0, keep_last=0, short=True), columns, device)
    if columns is None or not min_prompt:
        return _placed(call, columns, device)
    first, last = (c.to(device).expand(batch) for c in columns)
    ends = torch.where(last < past + tokens, last, end)  # a row that ended before its call did has no further tokens
    return _with_short(_padded(call, columns, device), ends - first < min_prompt)


def _with_short(call: ForwardContext, short: Tensor) -> ForwardContext:
    """The padded call in which all tokens of the rows ``short`` are updated, the first one too."""
    assert call.lengths is not None  # so it is padded, or has contexts of different lengths
    assert call.sink_positions is not None
    tails = call.tails
    if tails is None:
        tails = torch.full_like(call.lengths, call.decode_tokens)
    keeps = torch.full_like(call.lengths, call.keep_last) if call.keeps is None else call.keeps
    return dataclasses.replace(
        call,
        left_out=torch.where(short, -1, call.sink_positions).int(),
        tails=torch.where(short, call.lengths, tails).int(),
        shortest=0,
        keeps=torch.where(short, 0, keeps).int() if call.keep_last else None,
    )


def _mask(phase: Phase, kwargs: dict[str, Any], batch: int, columns: int) -> Any:
    """The mask from which padding is read, of all ``columns`` so far."""
    if phase.padding_mask is not None and phase.padding_mask.shape == (batch, columns):
        return phase.padding_mask
    return None if phase.unpadded else kwargs.get("attention_mask")


def _placed(call: ForwardContext, columns: Columns | None, device: torch.device) -> ForwardContext:
    """The call with its padding and sinks."""
    if columns is not None:
        return _padded(call, columns, device)
    if not call.first:
        absent = torch.full((call.batch,), -1, dtype=torch.int32, device=device)
        call = dataclasses.replace(call, sink_positions=absent)
    return call


def _with_context(
    call: ForwardContext, columns: Columns | None, context: tuple[int, ...], device: torch.device
) -> ForwardContext:
    """The call of which only so many tokens of each row are prompt, the first ones ever given."""
    if len(context) not in (1, call.batch):
        raise OrthoRankError(
            f"lengths of orthorank.context() has {len(context)} entries and the call {call.batch} rows; give one for "
            "each row, or one for all"
        )
    here = [min(call.tokens, max(0, length - call.past)) for length in context]
    ends = [call.past < length <= call.past + call.tokens for length in context]  # whether it does in this call
    if columns is None and min(here) == max(here) and (min(ends) == max(ends) or call.keep_last == 0):
        keep = min(call.keep_last, here[0]) if ends[0] else 0
        return _placed(dataclasses.replace(call, prompt_tokens=here[0], keep_last=keep), None, device)
    if columns is None:
        columns = _all_columns(call, device)
    start, end = (c.to(device).expand(call.batch) for c in columns)
    prompt_end = start + torch.tensor(context, device=device)
    here_from, here_to = start.clamp(min=call.past), end.clamp(max=call.past + call.tokens)
    tails = (here_to - torch.maximum(prompt_end, here_from)).clamp(min=0).int()
    keeps = None
    if call.keep_last:  # where the context ends in this call: a row that is shorter may go on in the next
        keeps = torch.where((prompt_end > call.past) & (prompt_end <= end), call.keep_last, 0).int()
    return dataclasses.replace(_padded(call, columns, device), tails=tails, shortest=min(here), keeps=keeps)


def _all_columns(call: ForwardContext, device: torch.device) -> Columns:
    """Of rows without padding."""
    zeros = torch.zeros(call.batch, dtype=torch.int64, device=device)
    return zeros, zeros + call.past + call.tokens


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among a call's arguments: ``cache`` since transformers 5.24, before that ``past_key_values``."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def _past(cache: Any, phase: Phase, tokens: int) -> int:
    """Columns before this call."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and length.device.type != "cpu" and phase.padding_mask is not None:
        return phase.padding_mask.shape[1] - tokens  # the mask of `generate()` covers all columns: nothing waits
    return int(length) if isinstance(length, Tensor) else length  # which a graph may leave open


def _decodes_over_tensors(cache: Any, phase: Phase, tokens: int) -> bool:
    """Whether a call decodes over a cache that counts its tokens in a tensor, which a compiled graph cannot read.

    An int of the phase would be a constant of the graph, compiled anew for each prompt; so ``decodes`` is asked first.
    """
    counts_in_tensor = cache is not None and isinstance(cache.get_seq_length(), Tensor)
    return counts_in_tensor and (phase.decodes or (tokens == 1 and phase.prompt is None))


def _prompt_tokens(phase: Phase, past: int, tokens: int, ranks_decoded: bool) -> int:
    """How many of the call's tokens are prompt. A single token over a filled cache is a decode step."""
    if phase.prompt_end is not None:
        return max(0, min(tokens, phase.prompt_end - past))
    if phase.context is not None or ranks_decoded:
        return tokens
    return 0 if past > 0 and tokens == 1 else tokens


def _padded(call: ForwardContext, columns: Columns, device: torch.device) -> ForwardContext:
    start, end = (c.to(device).expand(call.batch) for c in columns)  # one mask may serve all rows
    first = (start - call.past).clamp(0, call.tokens)
    last = (end - call.past).clamp(0, call.tokens)
    here = (start >= call.past) & (start < call.past + call.tokens)
    return dataclasses.replace(
        call,
        lengths=(last - first).clamp(min=0).int(),
        starts=first.clamp(max=call.tokens - 1).int(),  # a row without tokens may name any of them: its length is 0
        key_starts=start.int().contiguous(),
        sink_positions=torch.where(here, start - call.past, -1).int(),
    )
