"""One call of the model, seen by the selected layers: what is prompt, what is padding, where the sinks are.

Columns count the tokens of a row from its first one ever given, padding included: the cached ones, then those of this
call. A call is a *prefill* as far as its tokens belong to the prompt, and *decode* beyond it. Decode tokens are dense.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orthorank.errors import OrthoRankError
from orthorank.masks import Columns, refuse_packed, refuse_restarts, valid_columns
from orthorank_kernels import keep_count


@dataclass
class Phase:
    """What the caller said of the calls to come; see `Handle.decoding`, `Handle.prefilling` and `generate()`.

    Args:
        prompt: columns that are prompt; None: every multi-token call is prefill.
        keep_last: tokens at the prompt's end that are always updated.
        padding_mask: the ``[batch, columns]`` mask that `generate()` was about to turn into another kind.
        unpadded: whether `generate()` had no mask, so that the one it makes shows no padding, only windows.
        decodes: whether the next call is known to hold generated tokens alone; what a compiled graph goes by.
    """

    prompt: int | None = None
    keep_last: int = 0
    padding_mask: Tensor | None = None
    unpadded: bool = False
    decodes: bool = False


@dataclass(frozen=True)
class Call:
    """What the selected layers need to know of one call. Tensors are int32 ``[batch]`` on the device of the layer.

    Args:
        batch, tokens: shape of the call; past: tokens in the cache before it.
        prompt_tokens: how many tokens at the call's beginning are prompt; the others are decoded: all updated.
        keep_last: how many tokens at the end of the prompt part are updated whatever their score.
        starts: first valid token of each row inside the call, lengths: how many; None without padding.
        key_starts: first valid column of each row; None without padding.
        sink_positions: the sink's index inside the call, -1 where it was in an earlier one; None: the first token.
        valid: the sum of lengths, counted: `counts` with padding and their sum, by keep ratio; once for all layers.
        workspace: zeros for `rms_norm_select`, which leaves them zero, so that one serves all layers.
        ran: the plan's layers that ran in this call.
        watcher: is told what each layer selects; see `Handle.watching`.
        update_sink: whether the sinks are always updated, counted among the others.
    """

    batch: int
    tokens: int
    past: int
    prompt_tokens: int
    keep_last: int = 0
    starts: Tensor | None = None
    lengths: Tensor | None = None
    key_starts: Tensor | None = None
    sink_positions: Tensor | None = None
    valid: Tensor | None = None
    counted: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)
    workspace: Tensor | None = None
    ran: list[int] = dataclasses.field(default_factory=list)
    watcher: "Watcher | None" = None
    update_sink: bool = False

    @property
    def decodes_only(self) -> bool:
        """Whether no token of the call is prompt."""
        return self.prompt_tokens <= 0

    @property
    def first(self) -> bool:
        """Whether nothing came before this call, so that every row's sink is in it (or not yet anywhere)."""
        return self.past == 0

    @property
    def decode_tokens(self) -> int:
        """How many tokens at the end of the call are generated ones."""
        return self.tokens - self.prompt_tokens

    @property
    def forced(self) -> int:
        """How many tokens at the end of each row are updated whatever their score."""
        return self.keep_last + self.decode_tokens

    def counts(self, ratio: float) -> tuple[int | Tensor, int]:
        """How many tokens of each row a layer updates (an int without padding), and the most that any row can have."""
        keep, extra = self.keep_last, self.decode_tokens
        with_sink = keep + self.update_sink  # tokens that are updated where the sink is among them
        never = not self.update_sink  # whether the sink is the one token that stays as it is
        if self.lengths is None:
            forced = with_sink if self.first else keep
            most = extra + keep_count(self.prompt_tokens, ratio, forced, sink_inside=never and self.first)
            return most, most
        most = extra + keep_count(self.prompt_tokens, ratio, with_sink, sink_inside=False)
        if ratio in self.counted:
            return self.counted[ratio][0], most
        prompt = (self.lengths - extra).clamp(min=0)
        inside = torch.ones_like(prompt, dtype=torch.bool) if self.sink_positions is None else self.sink_positions >= 0
        each = keep_count(prompt, ratio, keep, sink_inside=inside & never)
        if self.update_sink:
            each = torch.where(inside, keep_count(prompt, ratio, with_sink, sink_inside=False), each)
        return torch.where(self.lengths > 0, each + extra, 0).int(), most

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

    def prepared(self, ratios: Iterable[float], device: torch.device, update_sink: bool = False) -> "Call":
        """The same with what layers that select at one of ``ratios`` would compute anew, each of them."""
        workspace = torch.zeros(self.batch, dtype=torch.int32, device=device)
        call = dataclasses.replace(self, workspace=workspace, update_sink=update_sink)
        if call.lengths is None:
            return call
        counted = {ratio: (each, each.sum()) for ratio in ratios if isinstance(each := call.counts(ratio)[0], Tensor)}
        return dataclasses.replace(call, counted=counted, valid=call.lengths.sum())

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
        return dataclasses.replace(self, counted=counted, **moved)


Watcher = Callable[[int, Tensor, Call], None]


def read_call(shape: tuple[int, int], device: torch.device, phase: Phase, kwargs: dict[str, Any]) -> Call:
    """The call that ``kwargs`` of the decoder's forward describe.

    Args:
        shape: batch and tokens of the call.
        phase: what the caller said before.
    """
    batch, tokens = shape
    refuse_packed(kwargs)
    cache = cache_of(kwargs)
    if torch.compiler.is_compiling() and _decodes_over_tensors(cache, phase, tokens):
        return Call(batch, tokens, past=1, prompt_tokens=0)  # how much more came before, dense layers do not ask
    past = _past(cache, phase, tokens)
    call = Call(batch, tokens, past, _prompt_tokens(phase, past, tokens))
    if call.decodes_only:
        return call
    if phase.prompt is None or past + tokens >= phase.prompt:
        call = dataclasses.replace(call, keep_last=min(phase.keep_last, call.prompt_tokens))
    mask = None if phase.unpadded else kwargs.get("attention_mask")
    if phase.padding_mask is not None and phase.padding_mask.shape == (batch, past + tokens):
        mask = phase.padding_mask
    columns = valid_columns(mask, past + tokens, batch)
    refuse_restarts(kwargs.get("position_ids"), columns, past)
    if columns is not None:
        return _padded(call, columns, device)
    if not call.first:
        absent = torch.full((batch,), -1, dtype=torch.int32, device=device)
        call = dataclasses.replace(call, sink_positions=absent)
    return call


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
    return int(length)


def _decodes_over_tensors(cache: Any, phase: Phase, tokens: int) -> bool:
    """Whether a call decodes over a cache that counts its tokens in a tensor, which a compiled graph cannot read.

    An int of the phase would be a constant of the graph, compiled anew for each prompt; so ``decodes`` is asked first.
    """
    counts_in_tensor = cache is not None and isinstance(cache.get_seq_length(), Tensor)
    return counts_in_tensor and (phase.decodes or (tokens == 1 and phase.prompt is None))


def _prompt_tokens(phase: Phase, past: int, tokens: int) -> int:
    """How many of the call's tokens are prompt. A single token over a filled cache is a decode step."""
    if phase.prompt is not None:
        return max(0, min(tokens, phase.prompt - past))
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


@contextmanager
def phase_of(holder: Any, phase: Phase) -> Iterator[None]:
    """Inside, calls of the model are read by ``phase``."""
    refuse_other_threads(holder)
    before = holder.phase, holder.thread
    holder.phase, holder.thread = phase, threading.get_ident()
    try:
        yield
    finally:
        holder.phase, holder.thread = before


def refuse_other_threads(holder: Any) -> None:
    """A phase holds for the thread that began it; another thread's calls would be read by it, too."""
    if holder.thread is not None and holder.thread != threading.get_ident():
        raise OrthoRankError(
            "a model with a plan applied is in use by another thread (in generate(), decoding() or prefilling()); give "
            "each thread a copy.deepcopy of the patched model, or take turns with a lock"
        )
