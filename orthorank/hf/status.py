"""What an applied plan has done, layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from orthorank.common import format as words
from orthorank.config import OrthoRankConfig


class Total:
    """A sum of ints and of counts that lie on a device: adding waits for nothing, reading does."""

    def __init__(self) -> None:
        self._known = 0
        self._pending: list[Tensor] = []

    def add(self, count: int | Tensor) -> None:
        """Add ``count``, an int or a scalar tensor."""
        if isinstance(count, Tensor):
            self._pending.append(count)
            if len(self._pending) >= 1024:  # bounded memory for those who never read, who do not wait either
                self._pending = [_sum(self._pending)]
        else:
            self._known += count

    def value(self) -> int:
        """The sum so far. Nothing is changed: another thread may be adding."""
        pending = list(self._pending)
        devices = {count.device for count in pending}
        sums = [_sum([count for count in pending if count.device == device]) for device in devices]
        return self._known + sum(int(each) for each in sums)  # one wait for each device


def _sum(counts: list[Tensor]) -> Tensor:
    """On the device of the first."""
    return torch.stack([count.to(counts[0].device, torch.int64) for count in counts]).sum()


class LayerCounts:
    """How often a layer ran, and on how many tokens.

    Inside a compiled graph (`torch.compile`) the counts are added to a tensor on the layer's device: an int attribute
    would be a constant of the graph, which then would be compiled anew for each call. No call waits for the device;
    reading does. An exported program counts nothing: it has no handle to read from, and may write to no tensor of ours.

    Args:
        device: where the layer's tokens are; the CPU is taken for "meta", where offloaded weights wait.

    >>> counts = LayerCounts()
    >>> counts.add(12, 4)
    >>> counts.calls, counts.tokens_in, counts.tokens_updated
    (1, 12, 4)
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._calls, self._in, self._updated, self._unranked = 0, Total(), Total(), Total()
        place = "cpu" if torch.device(device).type == "meta" else device
        with torch.inference_mode(False):  # else the counts of a plan applied inside it could be changed only there
            self._compiled = torch.zeros(4, dtype=torch.int64, device=place)  # calls, and tokens: in, updated, unranked

    def add(self, tokens_in: int | Tensor, tokens_updated: int | Tensor, unranked: int | Tensor = 0) -> None:
        """Count one call; ``unranked`` of the updated tokens were generated ones, all of which are updated."""
        if _exports():
            return
        if torch.compiler.is_compiling():
            counts = [_scalar(count, self._compiled.device) for count in (1, tokens_in, tokens_updated, unranked)]
            self._compiled.add_(torch.stack(counts))
            return
        self._calls += 1
        self._in.add(tokens_in)
        self._updated.add(tokens_updated)
        self._unranked.add(unranked)

    @property
    def calls(self) -> int:
        """How often the layer ran."""
        return self._calls + int(self._compiled[0])

    @property
    def tokens_in(self) -> int:
        """Valid tokens that came in, over all calls."""
        return self._in.value() + int(self._compiled[1])

    @property
    def tokens_updated(self) -> int:
        """Tokens that the layer updated, over all calls."""
        return self._updated.value() + int(self._compiled[2])

    @property
    def achieved_ratio(self) -> float | None:
        """Share of the tokens that were ranked which the layer updated, over all calls; None before the first."""
        unranked = self.tokens_generated
        ranked = self.tokens_in - unranked
        return (self.tokens_updated - unranked) / ranked if ranked else None

    @property
    def tokens_generated(self) -> int:
        """Generated tokens among them, and those of prompts below `min_prompt`: all are updated, none is ranked."""
        return self._unranked.value() + int(self._compiled[3])

    def __repr__(self) -> str:
        return f"LayerCounts(calls={self.calls}, tokens_in={self.tokens_in}, tokens_updated={self.tokens_updated})"


@torch.compiler.assume_constant_result
def _exports() -> bool:
    """Whether a program is exported. Asked while tracing: PyTorch 2.11 itself traces the question as True, always."""
    return torch.compiler.is_exporting()


def _scalar(count: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(count, Tensor):
        return count.to(device, torch.int64)
    return torch.full((), count, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class LayerStatus:
    """One row of `status`: a layer's mode ("selected", "removed" or "dense") and counts. Dense layers count nothing.

    ``keep_ratio`` is what the plan asks for, ``achieved_ratio`` what became of it: the share of the prompt's tokens
    (and of generated ones that are ranked, too) that were updated. None before there were any. ``tokens_generated`` of
    ``tokens_in`` were generated and all updated, without being ranked.
    """

    layer: int
    mode: str
    keep_ratio: float
    calls: int | None = None
    tokens_in: int | None = None
    tokens_updated: int | None = None
    achieved_ratio: float | None = None
    tokens_generated: int | None = None


@dataclass(frozen=True)
class Status:
    """All layers of a model with a plan applied; ``str()`` gives a table of those that the plan names.

    ``note``: what is particular about the model's family, or nothing. ``correction``: which layers of a corrected plan
    have a map, and its rank; nothing without one. ``source``: repository and commit of a plan from the Hugging Face
    Hub, or nothing.
    """

    rows: list[LayerStatus]
    note: str = ""
    correction: str = ""
    source: str = ""

    def __str__(self) -> str:
        head = f"layer  mode       keep   calls  {'ranked':>10}  {'updated':>10}  share  {'generated':>10}"
        lines = [_line(row) for row in self.rows if row.calls is not None]
        others = [row.layer for row in self.rows if row.calls is None]
        dense = f"dense: {words.layers(others)}" if others else ""
        meaning = "ranked: tokens of prompts, of which a layer updates its share; generated ones are all updated"
        source = self.source and f"plan {self.source}"
        return "\n".join([head, *lines, *filter(None, (dense, meaning, source, self.correction, self.note))])


def status_of(config: OrthoRankConfig, num_layers: int, counts: dict[int, LayerCounts], note: str = "") -> Status:
    """The status of a model of ``num_layers`` layers under ``config``."""
    rows = []
    for layer in range(num_layers):
        if layer in counts:
            seen = counts[layer]
            ratio = config.ratio(layer)
            mode = {0.0: "removed", 1.0: "dense"}.get(ratio, "selected")
            row = LayerStatus(
                layer,
                mode,
                ratio,
                seen.calls,
                seen.tokens_in,
                seen.tokens_updated,
                seen.achieved_ratio,
                seen.tokens_generated,
            )
        else:
            row = LayerStatus(layer, "dense", 1.0)
        rows.append(row)
    found = config.correction
    said = "" if found is None else f"corrected with maps of rank {found.rank}: layers {words.layers(found.layers)}"
    return Status(rows, note, said, config.source or "")


def _line(row: LayerStatus) -> str:
    generated = row.tokens_generated or 0
    ranked, updated = (row.tokens_in or 0) - generated, (row.tokens_updated or 0) - generated
    share = "-" if row.achieved_ratio is None else f"{row.achieved_ratio:.3f}"
    return (
        f"{row.layer:>5}  {row.mode:<8}  {row.keep_ratio:>5.3f}  {row.calls:>6}  {ranked:>10,}  {updated:>10,}  "
        f"{share:>5}  {generated:>10,}"
    )
