"""Sizes of a campaign: those of models with seven and eight billion parameters, and tiny ones for a dry run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TINY = str(Path(__file__).with_name("tiny.json"))
LLAMA_3, LLAMA_2 = "Llama-3-8B", "Llama-2-7B"


@dataclass(frozen=True)
class Sizes:
    """Prompts are (batch, tokens); heads are (query heads, key/value heads, head_dim).

    Args:
        models: configurations for `random_model`, by name. flex, compiled: where a compiled peer is measured.
        copy: bytes that the copy moves; product: rows of the square product.
        warm: seconds of products before timing. measurement: seconds that one may take.
        sets: inputs that take turns. compiler, modes: of torch.compile.
        forwards: in a turn, for prompts below ``short`` tokens. layers: of the models; None: all of them.
    """

    models: dict[str, str]
    attention: Sequence[tuple[int, int]]
    heads: Sequence[tuple[int, int, int]]
    flex: Sequence[tuple[int, int]]
    rows: Sequence[tuple[int, int, int]]
    layer: Sequence[tuple[int, int]]
    compiled: Sequence[tuple[int, int]]
    prefill: Sequence[tuple[int, int]]
    smoke: tuple[int, int]
    long: int
    copy: int
    product: int
    warm: float
    measurement: float = 2.0
    sets: int = 3
    compiler: str = "inductor"
    modes: Sequence[str] = ("default", "reduce-overhead")
    short: int = 4096
    forwards: int = 10
    layers: int | None = None


FULL = Sizes(
    models={LLAMA_3: "llama-3-8b", LLAMA_2: "llama-2-7b"},
    attention=[(8, 2048), (1, 8192), (1, 32768)],
    heads=[(32, 8, 128), (32, 8, 64), (32, 32, 128)],
    flex=[(8, 2048), (1, 32768)],
    rows=[(16, 2048, 4096), (1, 32768, 4096)],
    layer=[(1, 512), (1, 2048), (32, 2048), (1, 8192), (1, 32768)],
    compiled=[(1, 2048), (32, 2048)],
    prefill=[(32, 2048), (1, 8192), (1, 32768), (1, 2048), (1, 512)],
    smoke=(1, 2048),
    long=131072,
    copy=8 << 30,
    product=8192,
    warm=2.0,
)
DRY = Sizes(
    models={LLAMA_3: TINY, LLAMA_2: TINY},
    attention=[(2, 48), (1, 64)],
    heads=[(4, 2, 16), (4, 2, 64)],
    flex=[(2, 48)],
    rows=[(2, 48, 64)],
    layer=[(1, 32), (2, 48)],
    compiled=[(1, 32)],
    prefill=[(2, 48), (1, 32)],
    smoke=(1, 48),
    long=96,
    copy=1 << 16,
    product=64,
    warm=0.01,
    measurement=0.02,
    sets=2,
    compiler="eager",
    modes=("default",),
    short=40,
    forwards=2,
)


def cut_of(batch: int, tokens: int, head_dim: int | None = None) -> list[str]:
    """The words by which a late campaign leaves a measurement out.

    >>> cut_of(1, 32768, 64)
    ['D64', '1x32768']
    """
    return (["D64"] if head_dim == 64 else []) + [f"{batch}x{tokens}"]
