"""The command ``orthorank-kernels``: launch settings for the GPU at hand. Needs torch alone.

It ends with 0, or with 2 and one sentence on stderr.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthorank_kernels._version import __version__
from orthorank_kernels.remedies import install

FAILED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (None: the process's own) and return its exit code.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    orthorank-kernels ...
    0
    """
    try:
        code = _run(arguments)
        sys.stdout.flush()  # while what cannot be written can still be said
        return code
    except OSError as error:
        code = _fail(f"the file system says of {error.filename or 'the output'}: {error.strerror or error}")
        with contextlib.suppress(OSError, ValueError):  # or Python flushes once more at its end, with a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said what was wrong, or printed the help
        return int(stop.code or 0)
    if options.version:
        print(f"orthorank-kernels {__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 0
    from orthorank_kernels.settings.lookup import SettingsError
    from orthorank_kernels.tuning.tune import TuningError

    try:
        return _tune(options)
    except (TuningError, SettingsError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; what was measured until then is kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="orthorank-kernels", description="Launch settings of the kernels.")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    tune = parser.add_subparsers(dest="command", metavar="tune").add_parser(
        "tune",
        help="measure launch settings on the GPU at hand",
        description="Time the launch settings of the kernels on a GPU and write the fastest to a JSON file, which "
        "every later process on this GPU reads. Takes minutes: each candidate is compiled.",
    )
    tune.add_argument("--op", action="append", help="an op, may be given again; default: all that have settings")
    tune.add_argument(
        "--kind",
        action="append",
        help="a kind of problem, such as '16-bit, head_dim 128' (--kind ? lists them); default: all",
    )
    tune.add_argument("--device", default="cuda", help="the GPU, such as cuda:1 (default: %(default)s)")
    tune.add_argument(
        "--output",
        type=Path,
        help="folder for the files, or one archive of them (FILE.tar); default: ORTHORANK_CONFIG_DIR, or the user's "
        "configuration folder, where launches look for them",
    )
    tune.add_argument("--seconds", type=float, help="after which no candidate is begun; default: until all are timed")
    tune.add_argument(
        "--workers", type=int, help="processes that compile while another candidate is timed; default: by the cores"
    )
    tune.add_argument(
        "--compile",
        metavar="TARGET",
        help="compile the candidates for a GPU that need not be here, such as sm_90, and measure nothing",
    )
    return parser


def _tune(options: argparse.Namespace) -> int:
    from orthorank_kernels import dispatch
    from orthorank_kernels.settings import lookup as _settings
    from orthorank_kernels.tuning import run as tuning_run
    from orthorank_kernels.tuning import tune as tuning

    try:
        device = dispatch.device_of(options.device)
    except ValueError:
        raise tuning.TuningError(f"device is {options.device!r}; it may be cuda or cuda:N") from None
    workers = tuning_run.default_workers() if options.workers is None else options.workers
    seconds = float("inf") if options.seconds is None else options.seconds
    for name, value in (("workers", workers), ("seconds", seconds)):
        if not value >= 0:
            raise tuning.TuningError(f"{name} is {value}; it must be 0 or more")
    jobs = tuning_run.jobs_of(options.op, options.kind)
    how: dict[str, Any] = {"seconds": seconds, "workers": workers, "say": lambda line: print(line, flush=True)}
    if options.compile is not None:
        left = tuning_run.compile_only(jobs, _target(options.compile), **how)
        return _late(f"{left} candidates were not compiled") if left else 0
    tuning.check_gpu(device)
    folder = options.output or _settings.user_folder()
    left = tuning_run.measure(jobs, device, folder, **how)
    return _late(f"{left} of {len(jobs)} kinds were not measured and keep the settings they had") if left else 0


def _target(name: str) -> str:
    from orthorank_kernels.tuning import compiling
    from orthorank_kernels.tuning import tune as tuning

    if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}", name):
        raise tuning.TuningError(f"compile is {name!r}; it may be an architecture such as sm_80, sm_90 or gfx942")
    if importlib.util.find_spec("triton") is None:
        raise tuning.TuningError(f"Triton is not installed; run: {install('triton')}")
    if name.startswith("sm_") and (said := compiling.unknown_to_ptxas(name)):
        raise tuning.TuningError(f"compile is {name!r}, which Triton's ptxas does not know ({said}); name another")
    return name


def _late(sentence: str) -> int:
    """What the time was too short for is no failure: what was done is kept."""
    print(f"orthorank-kernels: the time is over: {sentence}", file=sys.stderr)
    return 0


def _fail(sentence: str) -> int:
    print(f"orthorank-kernels: {sentence}", file=sys.stderr)
    return FAILED
