"""One call of the model, seen by the selected layers: what is prompt, what is padding, where the sinks are.

Columns count the tokens of a row from its first one ever given, padding included: the cached ones, then those of this
call. A call is a *prefill* as far as its tokens belong to the prompt, and *decode* beyond it. Decode tokens are dense.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.calls.masks import Columns, refuse_packed, refuse_restarts, refuse_right_padding, valid_columns
from orthorank.calls.phases import Phase
from orthorank.common.errors import OrthoRankError
from orthorank_kernels import keep_count

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Windows:
    """The windows of one call at one keep ratio, as packed sequences. Tensors are int32 ``[sequences (+ 1)]``.

    Args:
        cu_seqlens: where each begins among the ``batch * tokens`` of the call.
        counts: how many tokens each selects; sinks: where the row's sink is in it, -1 for elsewhere.
        most: the most that a row can select; where `is_exact`, what each row selects.
    """

    cu_seqlens: Tensor
    counts: Tensor
    sinks: Tensor
    most: int

    def on(self, device: torch.device) -> "Windows":
        """The same with its tensors on ``device``."""
        return Windows(self.cu_seqlens.to(device), self.counts.to(device), self.sinks.to(device), self.most)


@dataclass(frozen=True)
class Call:
    """What the selected layers need to know of one call. Tensors are int32 ``[batch]`` on the device of the layer.

    Args:
        batch, tokens: shape of the call; past: tokens in the cache before it.
        prompt_tokens: how many tokens at the call's beginning are prompt; the others are decoded.
        ranks_decoded: whether decoded tokens are ranked like the prompt; else all of them are updated.
        keep_last: how many tokens at the end of the prompt part are updated whatever their score.
        starts: first valid token of each row inside the call, lengths: how many; None without padding.
        key_starts: first valid column of each row; None without padding.
        sink_positions: the sink's index inside the call, -1 where it was in an earlier one; None: the first token.
        tails: how many decoded tokens each row ends with, where that differs; None: ``decode_tokens`` in all rows.
        shortest: with ``tails``: no row without padding has fewer prompt tokens in the call.
        keeps: with ``tails``: ``keep_last`` of each row, 0 where its prompt ends in another call; None: of all rows.
        valid: the sum of lengths, counted: `counts` with padding and their sum, by keep ratio; once for all layers.
        workspace: zeros for `rms_norm_select`, which leaves them zero, so that one serves all layers.
        watcher: is told what each layer selects; see `Handle.watching`.
        update_sink: whether the sinks are always updated, counted among the others.
    """

    batch: int
    tokens: int
    past: int
    prompt_tokens: int
    ranks_decoded: bool = False
    keep_last: int = 0
    starts: Tensor | None = None
    lengths: Tensor | None = None
    key_starts: Tensor | None = None
    sink_positions: Tensor | None = None
    valid: Tensor | None = None
    tails: Tensor | None = None
    shortest: int = 0
    keeps: Tensor | None = None
    counted: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)
    windows: dict[float, Windows] = field(default_factory=dict)
    workspace: Tensor | None = None
    watcher: "Watcher | None" = None
    update_sink: bool = False

    @property
    def decodes_only(self) -> bool:
        """Whether no token of the call is ranked, so that all are updated."""
        return self.prompt_tokens <= 0 and not self.ranks_decoded

    @property
    def first(self) -> bool:
        """Whether nothing came before this call, so that every row's sink is in it (or not yet anywhere)."""
        return self.past == 0

    @property
    def decode_tokens(self) -> int:
        """How many tokens at the end of the call are generated ones."""
        return self.tokens - self.prompt_tokens

    @property
    def forced_at_end(self) -> int | None:
        """How many tokens at the end of each row are updated whatever their score; None: they are elsewhere, too."""
        if self.tails is not None:
            return None
        if not self.ranks_decoded:
            return self.keep_last + self.decode_tokens
        return self.keep_last if self.decode_tokens == 0 or self.keep_last == 0 else None

    def forced_mask(self, device: torch.device) -> Tensor:
        """Which tokens are updated whatever their score: bool ``[batch or 1, tokens]``, without a word on padding."""
        column = torch.arange(self.tokens, device=device)[None]
        prompt_end, end = self._ends()
        return (column >= prompt_end - self.kept) & (column < (prompt_end if self.ranks_decoded else end))

    def ranked_mask(self, device: torch.device) -> Tensor:
        """Which tokens are ranked, neither padding nor dense by rule: bool ``[batch, tokens]``."""
        column = torch.arange(self.tokens, device=device)[None]
        prompt_end, end = self._ends()
        begin = 0 if self.starts is None else self.starts[:, None]
        ranked = (column >= begin) & (column < (end if self.ranks_decoded else prompt_end))
        return ranked.expand(self.batch, -1)

    def _ends(self) -> tuple[int | Tensor, int | Tensor]:
        """One past the last prompt token of each row, and one past the last valid one: int or ``[batch, 1]``."""
        end = self.tokens if self.starts is None or self.lengths is None else (self.starts + self.lengths)[:, None]
        return end - (self.decode_tokens if self.tails is None else self.tails[:, None]), end

    @property
    def kept(self) -> int | Tensor:
        """`keep_last` of all rows, or of each: int32 ``[batch, 1]``."""
        return self.keep_last if self.keeps is None else self.keeps[:, None]

    def counts(self, ratio: float) -> tuple[int | Tensor, int]:
        """How many tokens of each row a layer updates (an int without padding), and the most that any row can have."""
        keep, extra = self.keep_last, self.decode_tokens
        with_sink = keep + int(self.update_sink)  # tokens that are updated where the sink is among them
        never = not self.update_sink  # whether the sink is the one token that stays as it is
        if self.lengths is None:
            forced = with_sink if self.first else keep
            most = extra + keep_count(self.prompt_tokens, ratio, forced, sink_inside=never and self.first)
            return most, most
        prompt_tokens = self.prompt_tokens if self.tails is None else self.shortest  # the row with most to update
        most = self.tokens - prompt_tokens + keep_count(prompt_tokens, ratio, with_sink, sink_inside=False)
        if ratio in self.counted:
            return self.counted[ratio][0], most
        tails = extra if self.tails is None else self.tails
        prompt = (self.lengths - tails).clamp(min=0)
        inside = torch.ones_like(prompt, dtype=torch.bool) if self.sink_positions is None else self.sink_positions >= 0
        each = self._each(prompt, ratio, keep, inside)
        if self.keeps is not None:  # and a row whose prompt ends elsewhere keeps none of these
            each = torch.where(self.keeps > 0, each, self._each(prompt, ratio, 0, inside))
        return torch.where(self.lengths > 0, each + tails, 0).int(), most

    def _each(self, prompt: Tensor, ratio: float, keep: int, inside: Tensor) -> Tensor:
        """How many of the ``prompt`` tokens of each row a layer updates; ``inside``: whether the sink is among them."""
        each = keep_count(prompt, ratio, keep, sink_inside=inside & (not self.update_sink))
        if not self.update_sink:
            return each
        return torch.where(inside, keep_count(prompt, ratio, keep + 1, sink_inside=False), each)

    def row_positions(self, device: torch.device) -> Tensor:
        """Each token's place in its row, the first valid token at 0: int64 ``[batch or 1, tokens]``, below 0 before it.

        Cached tokens count, padding does not.
        """
        columns = self.past + torch.arange(self.tokens, device=device)[None]
        return columns if self.key_starts is None else columns - self.key_starts[:, None]

    def tokens_in(self) -> int | Tensor:
        """Valid tokens of the call."""
        if self.valid is not None:
            return self.valid
        return self.batch * self.tokens if self.lengths is None else self.lengths.sum()

    def tokens_updated(self, ratio: float) -> int | Tensor:
        """Tokens that a selected layer updates in this call."""
        if ratio in self.counted:
            return self.counted[ratio][1]
        each, _ = self.counts(ratio)
        return each.sum() if isinstance(each, Tensor) else self.batch * each

    def tokens_unranked(self) -> int | Tensor:
        """Generated tokens among them that are all updated."""
        if self.ranks_decoded:
            return 0
        return self.batch * self.decode_tokens if self.tails is None else self.tails.sum()

    def on(self, device: torch.device) -> "Call":
        """The same with its tensors on ``device``, where another part of the model may lie."""
        moved: dict[str, Any] = {
            each.name: value.to(device)
            for each in dataclasses.fields(self)
            if isinstance(value := getattr(self, each.name), Tensor) and value.device != device
        }
        if not moved:
            return self
        counted = {ratio: (k.to(device), total.to(device)) for ratio, (k, total) in self.counted.items()}
        windows = {ratio: windows.on(device) for ratio, windows in self.windows.items()}
        return dataclasses.replace(self, counted=counted, windows=windows, **moved)


Watcher = Callable[[int, Tensor, Call], None]


def read_call(
    shape: tuple[int, int], device: torch.device, phase: Phase, kwargs: dict[str, Any], decode: str = "dense"
) -> Call:
    """The call that ``kwargs`` of the decoder's forward describe.

    Args:
        shape: batch and tokens of the call.
        phase: what the caller said before; decode: what the plan says of generated tokens.
    """
    batch, tokens = shape
    refuse_packed(kwargs)
    cache = cache_of(kwargs)
    if torch.compiler.is_compiling() and decode == "dense" and _decodes_over_tensors(cache, phase, tokens):
        return Call(batch, tokens, past=1, prompt_tokens=0)  # how much more came before, dense layers do not ask
    past = _past(cache, phase, tokens)
    ranks_decoded = decode == "threshold"
    call = Call(batch, tokens, past, _prompt_tokens(phase, past, tokens, ranks_decoded), ranks_decoded)
    if call.decodes_only:
        return call
    if phase.prompt_end is None or past + tokens >= phase.prompt_end:
        call = dataclasses.replace(call, keep_last=min(phase.keep_last, call.prompt_tokens))
    mask = None if phase.unpadded else kwargs.get("attention_mask")
    if phase.padding_mask is not None and phase.padding_mask.shape == (batch, past + tokens):
        mask = phase.padding_mask
    columns = valid_columns(mask, past + tokens, batch)
    if ranks_decoded and phase.prompt and columns is not None:
        refuse_right_padding(columns, past + tokens)
    refuse_restarts(kwargs.get("position_ids"), columns, past)
    if phase.context is not None and (call.keep_last or not ranks_decoded):
        return _with_context(call, columns, phase.context, device)
    return _placed(call, columns, device)


def _placed(call: Call, columns: Columns | None, device: torch.device) -> Call:
    """The call with its padding and sinks."""
    if columns is not None:
        return _padded(call, columns, device)
    if not call.first:
        absent = torch.full((call.batch,), -1, dtype=torch.int32, device=device)
        call = dataclasses.replace(call, sink_positions=absent)
    return call


def _with_context(call: Call, columns: Columns | None, context: tuple[int, ...], device: torch.device) -> Call:
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
        zeros = torch.zeros(call.batch, dtype=torch.int64, device=device)
        columns = zeros, zeros + call.past + call.tokens
    start, end = (c.to(device).expand(call.batch) for c in columns)
    prompt_end = start + torch.tensor(context, device=device)
    here_from, here_to = start.clamp(min=call.past), end.clamp(max=call.past + call.tokens)
    tails = (here_to - torch.maximum(prompt_end, here_from)).clamp(min=0).int()
    keeps = None
    if call.keep_last:  # where the context ends in this call: a row that is shorter may go on in the next
        keeps = torch.where((prompt_end > call.past) & (prompt_end <= end), call.keep_last, 0).int()
    return dataclasses.replace(_padded(call, columns, device), tails=tails, shortest=min(here), keeps=keeps)


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


def _padded(call: Call, columns: Columns, device: torch.device) -> Call:
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
