"""The steps of both campaigns, as data: order, times, what is left out first when time is short.

A step is one or several child processes that begin together. Its children are commands after ``python``, in which
``{job}``, ``{work}``, ``{files}`` and ``{seconds}`` are filled in by the parent (see `parent.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.campaign.kernels import KERNELS

CUT_FIRST = ("D64", "Llama-2-7B", "1x32768")  # in this order, when a campaign is late
LEAST = 8.0  # seconds; with less a step cannot start its process and measure anything
A_SECONDS, B_SECONDS = 520.0, 275.0
PATIENCE = 20.0  # of a dry run without --seconds: whatever else the machine does, no limit is reached


@dataclass(frozen=True)
class Child:
    """One process of a step.

    Args:
        name: as its lines and its output name it.
        command: what follows ``python``, or a whole command line if ``program``.
        seconds: its limit; None: the step's.
        dry: what runs instead in a dry run; None: the same.
        off: environment for all later steps if it does not end well. environment: of this process alone.
        lines_from: a file in its work folder whose lines become results.
        refuses: its exit code 2 says that this cannot run here, and is no failure.
    """

    name: str
    command: Sequence[str]
    seconds: float | None = None
    program: bool = False
    dry: Sequence[str] | None = None
    off: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    lines_from: str | None = None
    refuses: bool = False


@dataclass(frozen=True)
class Step:
    """``seconds``: its limit, starts of processes included; ``saves``: how much shorter it is without what is cut."""

    name: str
    seconds: float
    what: str
    children: Sequence[Child]
    saves: Mapping[str, float] = field(default_factory=dict)

    def shortened(self, cuts: Sequence[str]) -> float:
        """Its limit with ``cuts``."""
        return self.seconds - sum(self.saves.get(cut, 0.0) for cut in cuts)


def own(step: str, *more: str) -> tuple[str, ...]:
    """The command of a step of this package."""
    return ("-m", "benchmarks.campaign.child", step, "{job}", *more)


SMOKE = Step(
    "smoke", 25, "every op once against float64, each attention kernel in a process of its own",
    [Child("ops", own("smoke", "ops"))]
    + [Child(kernel.name, own("smoke", kernel.name), seconds=20, off=kernel.off) for kernel in KERNELS],
)  # fmt: skip
# Later steps find them in the page cache; no step waits for it.
IMPORTS = ("-c", "import transformers.models.llama.modeling_llama, triton, torch._dynamo")
TESTS = ("benchmarks/on_gpu.py", "tests", "--output", "{work}", "--seconds", "{seconds}")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.hardware",
          "--hardware-lines={work}/tests.jsonl")  # fmt: skip
# A few of the same tests in the interpreter, with a line each.
DRY_TESTS = (*PYTEST, "tests/orthorank_kernels/ops/test_rows.py", "-k", "gather and not offsets and float32")
A = (
    Step("about", 15, "versions, card, ceilings",
         [Child("about", own("about")), Child("imports", IMPORTS, dry=("--version",))]),
    SMOKE,
    Step("attention", 60, "attention beside its peers", [Child("attention", own("attention"))],
         {"D64": 15, "1x32768": 15}),
    Step("rows", 50, "the ops on rows beside PyTorch", [Child("rows", own("rows"))], {"1x32768": 20}),
    Step("layer", 50, "one layer, dense and selected", [Child("layer", own("layer"))],
         {"Llama-2-7B": 15, "1x32768": 10}),
    Step("prefill", 130, "whole prefill with random weights", [Child("prefill", own("prefill"))],
         {"Llama-2-7B": 55, "1x32768": 25}),
    Step("probes", 25, "single PTX instructions against their table", [Child("probes", own("probes"))]),
    Step("parity", 150, "kernel tests on hardware",
         [Child("parity", TESTS, dry=DRY_TESTS, lines_from="tests.jsonl", refuses=True)]),
)  # fmt: skip

ATTENTION_KINDS = ("16-bit, head_dim 128", "16-bit, head_dim 64")
TUNE = (
    "-m", "orthorank_kernels", "tune", "--op", "sparse_query_attention",
    *(word for kind in ATTENTION_KINDS for word in ("--kind", kind)), "--output", "{files}/configs",
    "--seconds", "{seconds}",
)  # fmt: skip


def sanitizer(tool: str) -> Child:
    """Every op at small sizes under one tool of compute-sanitizer; without a GPU the same calls without it."""
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--log-file", "{files}/" + f"{tool}.txt",
               "{python}", *own("every_op"))  # fmt: skip
    dry = own("every_op") if tool == "memcheck" else ("--version",)
    # Without PyTorch's cache each tensor is an allocation of its own, past whose end memcheck sees.
    return Child(tool, command, program=True, dry=dry, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


COUNTERS = Child(
    "ncu",
    ("ncu", "--set", "full", "--kernel-name", "regex:sparse_query_attention|norm_select|rms_norm", "--launch-count",
     "4", "--csv", "--page", "raw", "--log-file", "{files}/ncu.csv", "{python}", *own("counters")),
    program=True, dry=own("counters"),
)  # fmt: skip
HUGE = Child("huge", (*PYTEST, "-m", "huge", "tests/orthorank_kernels"), dry=("--version",), lines_from="tests.jsonl")
B = (
    Step("replays", 30, "graph replay equal to eager bit for bit after inputs changed",
         [Child("replays", own("replays"))]),
    Step("tune", 50, "launch settings of attention", [Child("tune", TUNE, refuses=True)]),
    Step("compiled", 50, "torch.compile of four patched layers", [Child("compiled", own("compiled"))]),
    Step("sanitizer", 60, "memcheck and racecheck over every op", [sanitizer("memcheck"), sanitizer("racecheck")]),
    Step("counters", 20, "ncu's counters of attention and norm + selection", [COUNTERS]),
    Step("long", 20, "a prompt of 131,072 tokens", [Child("long", own("long"))]),
    Step("huge", 45, "tests past 2^31 elements", [HUGE]),
)  # fmt: skip
CAMPAIGNS = {"A": A, "B": B}
SECONDS = {"A": A_SECONDS, "B": B_SECONDS}


def cuts(steps: Sequence[Step], left: float) -> list[str]:
    """What has to be left out so that ``steps`` fit into ``left`` seconds: as little as possible, in a fixed order.

    The order is that of `CUT_FIRST`. All of it if even that does not fit.

    >>> cuts(A, 520), cuts(A[2:], 460), cuts(A[2:], 400)
    ([], ['D64'], ['D64', 'Llama-2-7B'])
    """
    found: list[str] = []
    for cut in CUT_FIRST:
        if sum(step.shortened(found) for step in steps) <= left:
            return found
        if any(cut in step.saves for step in steps):
            found.append(cut)
    return found
