"""One call of the model, seen by the selected layers: what is prompt, what is padding, where the sinks are.

Columns count the tokens of a row from its first one ever given, padding included: the cached ones, then those of this
call. A call is a *prefill* as far as its tokens belong to the prompt, and *decode* beyond it. Decode tokens are dense.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orthorank_kernels import keep_count


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
class ForwardContext:
    """What the selected layers need to know of one call. Tensors are int32 ``[batch]`` on the device of the layer.

    Args:
        batch, tokens: shape of the call; past: tokens in the cache before it.
        prompt_tokens: how many tokens at the call's beginning are prompt; the others are decoded.
        ranks_decoded: whether decoded tokens are ranked like the prompt; else all of them are updated.
        keep_last: how many tokens at the end of the prompt part are updated whatever their score.
        starts: first valid token of each row inside the call, lengths: how many; None without padding.
        key_starts: first valid column of each row; None without padding.
        sink_positions: the sink's index inside the call, -1 where it was in an earlier one; None: the first token.
        left_out: the same, -1 also where the sink is updated like any other token of its row; None: nowhere is it.
        short: whether all rows have too short prompts (a plan's ``min_prompt``), so that no layer selects.
        tails: how many decoded tokens each row ends with, where that differs; None: ``decode_tokens`` in all rows.
        shortest: with ``tails``: no row without padding has fewer prompt tokens in the call.
        keeps: with ``tails``: ``keep_last`` of each row, 0 where its prompt ends in another call; None: of all rows.
        valid: the sum of lengths; counted: `counts` and the sum over rows, by keep ratio; once for all layers.
        workspace: zeros for `rms_norm_select`, which leaves them zero, so that one serves all layers.
        watcher: is told what each layer selects; see `Handle.watching`.
        update_sink: whether the sinks are always updated, counted among the others.
        multiple: what the number of updated prompt tokens is rounded up to a multiple of.
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
    left_out: Tensor | None = None
    short: bool = False
    valid: Tensor | None = None
    tails: Tensor | None = None
    shortest: int = 0
    keeps: Tensor | None = None
    counted: dict[float, tuple[int | Tensor, int, int | Tensor]] = field(default_factory=dict)
    windows: dict[float, Windows] = field(default_factory=dict)
    workspace: Tensor | None = None
    watcher: "Watcher | None" = None
    update_sink: bool = False
    multiple: int = 1

    @property
    def sinks_left_out(self) -> Tensor | None:
        """The sinks that no layer selects, as `sink_positions` says where they are."""
        return self.sink_positions if self.left_out is None else self.left_out

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
        """Which tokens are updated whatever their score: bool ``[batch or 1, tokens]``, padding included."""
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
        if ratio in self.counted:
            return self.counted[ratio][:2]
        keep, extra = self.keep_last, self.decode_tokens
        with_sink = keep + int(self.update_sink)  # tokens that are updated where the sink is among them
        never = not self.update_sink  # whether the sink is the one token that stays as it is
        if self.lengths is None:
            forced = with_sink if self.first else keep
            most = extra + self._keep(self.prompt_tokens, ratio, forced, sink_inside=never and self.first)
            return most, most
        prompt_tokens = self.prompt_tokens if self.tails is None else self.shortest  # the row with most to update
        most = self.tokens - prompt_tokens + self._keep(prompt_tokens, ratio, with_sink, sink_inside=False)
        tails = extra if self.tails is None else self.tails
        prompt = (self.lengths - tails).clamp(min=0)
        inside = torch.ones_like(prompt, dtype=torch.bool) if self.sink_positions is None else self.sink_positions >= 0
        each = self._each(prompt, ratio, keep, inside)
        if self.keeps is not None:  # and a row whose prompt ends elsewhere keeps none of these
            each = torch.where(self.keeps > 0, each, self._each(prompt, ratio, 0, inside))
        return torch.where(self.lengths > 0, each + tails, 0).int(), most

    def _each(self, prompt: Tensor, ratio: float, keep: int, inside: Tensor) -> Tensor:
        """How many of the ``prompt`` tokens of each row a layer updates; ``inside``: whether the sink is among them."""
        each = self._keep(prompt, ratio, keep, sink_inside=inside & (not self.update_sink))
        if not self.update_sink:
            return each
        return torch.where(inside, self._keep(prompt, ratio, keep + 1, sink_inside=False), each)

    def _keep(self, prompt: Any, ratio: float, keep: int, sink_inside: Any) -> Any:
        return keep_count(prompt, ratio, keep, sink_inside=sink_inside, multiple=self.multiple)

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
        return self.counted_for(ratio)[2]

    def counted_for(self, ratio: float) -> tuple[int | Tensor, int, int | Tensor]:
        """`counts`, and how many tokens a layer updates in all rows."""
        if ratio in self.counted:
            return self.counted[ratio]
        each, most = self.counts(ratio)
        return each, most, each.sum() if isinstance(each, Tensor) else self.batch * each

    def tokens_unranked(self) -> int | Tensor:
        """Generated tokens among them that are all updated."""
        if self.ranks_decoded:
            return 0
        return self.batch * self.decode_tokens if self.tails is None else self.tails.sum()

    def on(self, device: torch.device) -> "ForwardContext":
        """The same with its tensors on ``device``, where another part of the model may lie."""
        if self.workspace is not None and self.workspace.device == device:  # and the other tensors are where it is
            return self
        moved: dict[str, Any] = {
            each.name: value.to(device)
            for each in dataclasses.fields(self)
            if isinstance(value := getattr(self, each.name), Tensor) and value.device != device
        }
        if not moved:
            return self

        def there(count: int | Tensor) -> int | Tensor:
            return count.to(device) if isinstance(count, Tensor) else count

        counted = {r: (there(each), most, there(total)) for r, (each, most, total) in self.counted.items()}
        windows = {ratio: windows.on(device) for ratio, windows in self.windows.items()}
        return dataclasses.replace(self, counted=counted, windows=windows, **moved)


Watcher = Callable[[int, Tensor, ForwardContext], None]
