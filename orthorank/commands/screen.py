"""The terminal: headings, sentences, tables and progress bars with rich."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from orthorank.common.files import finite
from orthorank.common.progress import Advance

INDENT = 3


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


def print_json(value: Any) -> None:
    """What a machine reads, on stdout; infinite and NaN figures are null."""
    print(json.dumps(finite(value), indent=2))


def call(command: str, model: str | None, *rest: object) -> str:
    """A command line on the same ``model`` (None: the default one), to be copied.

    >>> call("eval ppl", "./my model", "--plan", "out")
    "orthorank eval ppl './my model' --plan out"
    """
    return shlex.join(["orthorank", *command.split(), *([] if model is None else [model]), *map(str, rest)])
