"""The command ``orthorank-kernels``: launch settings for the GPU at hand. Needs torch alone.

It ends with 0, or with 2 and one sentence on stderr.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from orthorank_kernels._version import __version__

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
    from orthorank_kernels._settings import SettingsError
    from orthorank_kernels.tuning import TuningError

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
    tune.add_argument("--kind", action="append", help="a kind of problem, such as '16-bit, head_dim 128'; default: all")
    tune.add_argument("--device", default="cuda", help="the GPU, such as cuda:1 (default: %(default)s)")
    tune.add_argument(
        "--output",
        type=Path,
        help="folder for the files; default: ORTHORANK_CONFIG_DIR, or the user's configuration folder, where launches "
        "look for them",
    )
    return parser


def _tune(options: argparse.Namespace) -> int:
    from orthorank_kernels import _library, _settings, dispatch, tuning

    try:
        device = dispatch.device_of(options.device)
    except ValueError:
        raise tuning.TuningError(f"device is {options.device!r}; it may be cuda or cuda:N") from None
    jobs = _jobs(options.op, options.kind)
    tuning.check_gpu(device)
    target = _library.launcher("configs.target_of")(device)
    folder = options.output or _settings.user_folder()
    for number, (op, kind) in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {op}, {kind}", file=sys.stderr, flush=True)
        found = tuning.tune(op, kind, device)
        path = tuning.save(op, _settings.gpu_name(target), {kind: found}, folder)
        settings = ", ".join(f"{name} {value}" for name, value in sorted(found.settings.items()))
        print(f"{op}, {kind}: {found.milliseconds:.3f} ms (default {found.default_milliseconds:.3f} ms): {settings}")
        print(f"  written to {path}", flush=True)
    return 0


def _jobs(ops: list[str] | None, kinds: list[str] | None) -> list[tuple[str, str]]:
    from orthorank_kernels import _settings, tuning

    for op in ops or ():
        if op not in tuning.tunable():
            raise tuning.TuningError(f"op is {op!r}; ops with launch settings are {', '.join(tuning.tunable())}")
    jobs = [(op, kind) for op in ops or tuning.tunable() for kind in _settings.kinds(op)]
    for kind in kinds or ():
        if kind not in (known := [k for _, k in jobs]):
            raise tuning.TuningError(f"kind is {kind!r}; it may be one of {'; '.join(known)}")
    return [(op, kind) for op, kind in jobs if not kinds or kind in kinds]


def _fail(sentence: str) -> int:
    print(f"orthorank-kernels: {sentence}", file=sys.stderr)
    return FAILED
