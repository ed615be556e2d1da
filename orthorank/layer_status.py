"""What an applied plan has done, layer by layer."""

from dataclasses import dataclass, field

from torch import Tensor

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
            if len(self._pending) >= 1024:  # bounded memory for those who never read
                self.value()
        else:
            self._known += count

    def value(self) -> int:
        """The sum so far."""
        self._known += sum(int(count) for count in self._pending)
        self._pending.clear()
        return self._known


@dataclass
class LayerCounts:
    """How often a layer ran, and on how many tokens.

    >>> counts = LayerCounts()
    >>> counts.add(12, 4)
    >>> counts.calls, counts.tokens_in, counts.tokens_updated
    (1, 12, 4)
    """

    calls: int = 0
    _in: Total = field(default_factory=Total, repr=False)
    _updated: Total = field(default_factory=Total, repr=False)

    def add(self, tokens_in: int | Tensor, tokens_updated: int | Tensor) -> None:
        """Count one call."""
        self.calls += 1
        self._in.add(tokens_in)
        self._updated.add(tokens_updated)

    @property
    def tokens_in(self) -> int:
        """Valid tokens that came in, over all calls."""
        return self._in.value()

    @property
    def tokens_updated(self) -> int:
        """Tokens that the layer updated, over all calls."""
        return self._updated.value()


@dataclass(frozen=True)
class LayerStatus:
    """One row of `status`: a layer's mode ("selected", "removed" or "dense") and counts. Dense layers count nothing."""

    layer: int
    mode: str
    keep_ratio: float
    calls: int | None = None
    tokens_in: int | None = None
    tokens_updated: int | None = None


@dataclass(frozen=True)
class Status:
    """All layers of a model with a plan applied; ``str()`` gives a table.

    ``note``: what is particular about the model's family, or nothing.
    """

    rows: list[LayerStatus]
    note: str = ""

    def __str__(self) -> str:
        head = f"{'layer':>5}  {'mode':<8}  {'keep':>5}  {'calls':>6}  {'tokens in':>10}  {'updated':>10}"
        return "\n".join([head, *(_line(row) for row in self.rows), *([self.note] if self.note else [])])


def status_of(config: OrthoRankConfig, num_layers: int, counts: dict[int, LayerCounts], note: str = "") -> Status:
    """The status of a model of ``num_layers`` layers under ``config``."""
    rows = []
    for layer in range(num_layers):
        if layer in counts:
            seen = counts[layer]
            ratio = config.ratio(layer)
            mode = {0.0: "removed", 1.0: "dense"}.get(ratio, "selected")
            row = LayerStatus(layer, mode, ratio, seen.calls, seen.tokens_in, seen.tokens_updated)
        else:
            row = LayerStatus(layer, "dense", 1.0)
        rows.append(row)
    return Status(rows, note)


def _line(row: LayerStatus) -> str:
    if row.calls is None:
        return f"{row.layer:>5}  {row.mode:<8}  {row.keep_ratio:>5.3g}"
    return (
        f"{row.layer:>5}  {row.mode:<8}  {row.keep_ratio:>5.3g}  {row.calls:>6}  {row.tokens_in:>10}  "
        f"{row.tokens_updated:>10}"
    )
