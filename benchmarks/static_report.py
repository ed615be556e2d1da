"""What every kernel compiles to, for every launch setting that its launcher can choose, on GPUs that are absent.

    python benchmarks/static_report.py                    # measure what is missing or was changed since
    python benchmarks/static_report.py --target sm_90 --only 'dim 128'
    python benchmarks/static_report.py --check            # the default settings' limits, in a minute or two

Writes ``benchmarks/results/static.json`` and a table of it, ``static.md``. A measurement is kept with a hash of what it
depends on (see `benchmarks/static/fingerprint.py`) and made again only when that changes, unless the compiler would be
asked for the same as before; an interrupted run goes on where it stopped. ``--check`` compiles the cases that are not
slow, writes nothing, exits with 1 when a limit is broken, and prints the worst ratio of a measurement to its limit as
the last word. Peers are measured when they are installed (`make bench-install`).
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from benchmarks.static import sass
from benchmarks.static.case import REPORTED_TARGETS, TARGETS, broken_limits, worst_ratio
from benchmarks.static.occupancy import occupancy
from benchmarks.static.run import measurements, triton_version
from benchmarks.static.store import Place, Row, Store, Wanted, is_current, wanted
from benchmarks.static.tables import markdown

RESULTS = Path(__file__).resolve().parent / "results"
COMMAND = "python benchmarks/static_report.py"
CHUNK = 24  # cases of one process: its start takes as long as a few of them
PACKAGES = {"Liger-Kernel": "liger_kernel", "FlagGems": "flag_gems", "FlexAttention": "torch"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=REPORTED_TARGETS, help="only this GPU; may be repeated")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--check", action="store_true", help="compile the default settings and check their limits")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of static.json and static.md")
    return parser.parse_args()


def installed(want: Wanted) -> bool:
    return want.case.group != "peers" or find_spec(PACKAGES[want.case.name.split()[0]]) is not None


def chunks(wants: Sequence[Wanted]) -> list[list[Wanted]]:
    """Cases that share a process: the default settings first, then those that take longest."""
    groups: dict[tuple[bool, str, str], list[Wanted]] = defaultdict(list)
    for want in wants:
        groups[want.case.slow, want.target, want.case.group].append(want)
    cut = [group[i : i + CHUNK] for group in groups.values() for i in range(0, len(group), CHUNK)]
    return sorted(cut, key=lambda chunk: (chunk[0].case.slow, chunk[0].case.group not in ("attention", "peers")))


def measure_all(
    wants: Sequence[Wanted],
    jobs: int,
    cache: Path | None,
    keep: Callable[[Wanted, Row], None],
    before: Mapping[Place, Row] | None = None,
) -> None:
    """Compile ``wants`` in ``jobs`` processes; each result is given to ``keep`` when it is there.

    A row of ``before`` for which the compiler was asked for the same as today stays, as one of today's sources.
    """
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("compiling", total=len(wants))

        def work(chunk: list[Wanted]) -> None:
            by_name = {want.case.name: want for want in chunk}
            first = chunk[0]
            old = {name: before[want.place] for name, want in by_name.items() if before and want.place in before}
            known = {name: row.get("asked", "") for name, row in old.items()}
            for measured in measurements(first.target, first.case.group, list(by_name), cache, known):
                name = measured["case"]
                same = measured.keys() == {"case", "asked"}
                keep(
                    by_name[name], {**old[name], "key": by_name[name].key} if same else row_of(by_name[name], measured)
                )
                want = by_name[name]
                progress.update(task, advance=1, description=f"{want.target} {want.case.name}")

        pending = [pool.submit(work, chunk) for chunk in chunks(wants)]
        try:
            for future in as_completed(pending):
                future.result()
        except BaseException:
            for future in pending:
                future.cancel()
            raise


def row_of(want: Wanted, measured: Row) -> Row:
    row: Row = {"target": want.target, "group": want.case.group, "slow": want.case.slow, "key": want.key, **measured}
    row.pop("seconds", None)  # of this machine, and no figure of the kernel
    if "error" in row:
        row["error"] = row["error"].strip().splitlines()[-1]
    else:
        row["occupancy"] = occupancy(want.target, row["warps"], row["registers"], row["shared"])
        row |= {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
    return row


def complaints(want: Wanted, row: Row) -> list[str]:
    """Broken limits of a row, in words. Targets without limits have no complaints."""
    if want.target not in TARGETS or want.case.group == "peers":
        return []
    found = [row["error"]] if "error" in row else broken_limits(row, want.case.limits_for(want.target), want.target)
    return [f"{want.target} {want.case.name}: {complaint}" for complaint in found]


def check(wants: Sequence[Wanted], jobs: int) -> int:
    """Compile everything anew and compare with the limits."""
    rows: list[tuple[Wanted, Row]] = []
    wants = [w for w in wants if not w.case.slow and w.case.group != "peers" and w.target in TARGETS]
    if not wants:
        print("no case has such a name and target")
        return 2
    with tempfile.TemporaryDirectory() as empty:
        measure_all(wants, jobs, Path(empty), lambda want, row: rows.append((want, row)))
    broken = [complaint for want, row in rows for complaint in complaints(want, row)]
    broken += [f"{w.target} {w.case.name}: was not compiled" for w in wants if w not in [want for want, _ in rows]]
    for complaint in broken:
        print(f"broken: {complaint}")
    (ratio, name), want = max(
        ((worst_ratio(r, w.case.limits_for(w.target), w.target), w) for w, r in rows if "error" not in r),
        key=lambda found: found[0],
        default=((float("inf"), "nothing"), wants[0]),
    )
    print(f"{len(rows)} kernels, {len(broken)} broken limits; nearest: {name} of {want.case.name} on {want.target}")
    print(f"worst ratio to its limit: {ratio:.3f}")
    return int(bool(broken))


def report(options: argparse.Namespace, everything: Sequence[Wanted], chosen: Sequence[Wanted], version: str) -> int:
    """Bring static.json and static.md up to date."""
    options.output.mkdir(parents=True, exist_ok=True)
    store = Store(options.output / "static.json")
    stale = store.stale(chosen)
    missing = sorted({w.case.name.split()[0] for w in stale if not installed(w)})
    stale = [w for w in stale if installed(w)]
    last_written = time.monotonic()

    def keep(want: Wanted, row: Row) -> None:
        nonlocal last_written
        store.rows[want.place] = row
        if time.monotonic() - last_written > 10:
            last_written = time.monotonic()
            store.write(everything, version)

    print(f"{len(chosen) - len(stale)} measurements are current, {len(stale)} to make")
    try:
        measure_all(stale, options.jobs, None, keep, store.rows)
    finally:
        store.write(everything, version)
        (options.output / "static.md").write_text(markdown(store.rows, everything, version, COMMAND), encoding="utf-8")
    for name in missing:
        print(f"not measured: {name} is not installed; run: make bench-install")
    found = [c for w in everything if is_current(row := store.rows.get(w.place), w) for c in complaints(w, row)]
    for complaint in found:
        print(f"broken: {complaint}")
    left = len(store.stale(everything))
    print(f"wrote {options.output / 'static.json'} and static.md: {len(store.rows)} rows, {len(found)} broken limits, ")
    print(f"{left} not current")
    return int(bool(found))


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was measured is written
    if not sass.tool("nvdisasm").exists():
        print("this Triton comes without NVIDIA's disassembler", file=sys.stderr)
        return 2
    version = triton_version()
    everything = wanted(version)
    targets = options.target or REPORTED_TARGETS
    chosen = [w for w in everything if w.target in targets and re.search(options.only, w.case.name)]
    if options.check:
        return check(chosen, options.jobs)
    try:
        return report(options, everything, chosen, version)
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and the same command goes on from there")
        return 130


if __name__ == "__main__":
    sys.exit(main())
