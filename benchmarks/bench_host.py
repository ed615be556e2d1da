"""What a call of an op costs the host, in microseconds of CPU time of its thread, without a GPU.

    python benchmarks/bench_host.py [--only REGEX] [--json benchmarks/results/host.json [--before]] [--profile OP]
    python benchmarks/bench_host.py --check     # what a launch by plan hands to the driver is what any launch does

Everything runs that runs before a launch on an H100, Triton's own Python and its wrapper of descriptors among it; in
place of the C functions that talk to the driver stand some that do nothing. Tensors lie on the CPU and go the way of
those on a GPU: the operators' CUDA implementations, no look at values.

Printed for each op: ``hit``, a call like one before it; ``lengths``, a call of which the numbers of tokens alone are
new; ``traced``, the second call of a kind, which makes the plans for other lengths possible; ``first``, a call of which
no plan is kept at all (what is compiled stays). Each is a median over rounds, in turns with
`torch.nn.functional.linear` of 1x1, whose time stands beside: on a machine where it takes 2.6 us, 20 us are wanted of a
hit, of attention 45, and of new lengths twice a hit. With ``--before`` the file keeps the figures apart, as those of
the code before.
"""

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

TARGET = "sm_90 NVIDIA H100 80GB HBM3"
LENGTHS = range(2048, 2048 + 24 * 48, 48)
CHECKED = (2096, 2049, 2056, 4096, 4098, 9000, 33, 3)  # beside the first of them
SELECTED = 3  # one token of so many
HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, PAGE, RANK = 4096, 14336, 32, 8, 128, 16, 64
Call = Callable[[], Any]
PLANS: Any = None
with contextlib.suppress(ImportError):  # in an earlier checkout
    PLANS = importlib.import_module("orthorank_kernels.launch_plan")


LAUNCHED: list[Any] = []  # what was handed to the driver, with --check


def noted(*args: Any) -> None:
    """In place of the launch."""
    LAUNCHED.append(args)


def nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what talks to the driver."""


def stand_in_gpu(launch: Any = nothing) -> None:
    """From now on Triton compiles for an H100, and its launcher for NVIDIA's GPUs calls ``launch``."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    from benchmarks.static.worker import AbsentGpu

    module: Any = nvidia
    for name in ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):  # of driver.c, from Triton 3.7 on
        setattr(module, name, nothing)
    module.compile_module_from_src = lambda *args, **kwargs: SimpleNamespace(launch=launch)  # until 3.6
    module.library_dirs = list
    gpu: Any = AbsentGpu(TARGET.split(" ")[0])
    gpu.launcher_cls = module.CudaLauncher
    gpu.utils = SimpleNamespace(
        launch=launch,
        build_signature_metadata=nothing,
        fill_tma_descriptor=lambda *args: args,
        fill_tma_descriptor_tiled=lambda *args: args,
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda name, code, *rest: (name, hash(code), 0, 0, 1024),
        unload_module=nothing,
    )
    driver.set_active(gpu)


def cpu_is_the_gpu() -> None:
    """From now on tensors on the CPU go the way of those on a GPU."""
    import orthorank_kernels.triton as kernels
    from orthorank_kernels import checks, op

    for found in pkgutil.iter_modules(kernels.__path__):
        module: Any = importlib.import_module(f"{kernels.__name__}.{found.name}")
        if hasattr(module, "target_of"):
            module.target_of = lambda device: TARGET
    checks.readable = lambda *values, **how: False  # type: ignore[assignment]
    for implementations in op._registered().implementations.values():
        implementations["cpu"] = implementations["cuda"]
    if PLANS is not None:
        PLANS.DEVICES.add("cpu")


def floats(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def calls(tokens: int) -> dict[str, Call]:
    """One call of each op for a prompt of so many tokens. The memory is not touched."""
    import orthorank_kernels as ok

    k = tokens // SELECTED
    x, weight, positions = floats(1, tokens, HIDDEN), floats(HIDDEN), ints(1, k)
    rows, residual, scores = floats(1, k, HIDDEN), floats(1, k, HIDDEN), floats(1, tokens, dtype=torch.float32)
    gate, up = floats(1, k, WIDTH), floats(1, k, WIDTH)
    q = floats(1, k, HEADS, HEAD_DIM).transpose(1, 2)
    keys, values = (floats(1, KV_HEADS, tokens, HEAD_DIM) for _ in range(2))
    cos, sin = (floats(1, tokens, HEAD_DIM) for _ in range(2))
    low, map_up = floats(1, tokens, RANK), floats(HIDDEN, RANK)
    queries, places = q.transpose(1, 2).squeeze(0), positions.squeeze(0)
    packed = [floats(tokens, KV_HEADS, HEAD_DIM) for _ in range(2)]
    pages = -(-tokens // PAGE)
    cache = [floats(pages, PAGE, KV_HEADS, HEAD_DIM) for _ in range(2)]
    kv_cache = floats(4096, KV_HEADS, PAGE, 2 * HEAD_DIM).transpose(1, 2).split(HEAD_DIM, -1)  # as vLLM has it
    merged, slots = floats(tokens, 2 * KV_HEADS, HEAD_DIM).split(KV_HEADS, 1), ints(tokens).long()
    angles = floats(32768, HEAD_DIM).split(HEAD_DIM // 2, -1)
    cu_selected, cu_keys, table, lengths = ints(2), ints(2), ints(1, pages), ints(1)
    return {
        "rms_norm_select": lambda: ok.rms_norm_select(x, weight, 1e-5, k),
        "rms_norm_score": lambda: ok.rms_norm_score(x, weight, 1e-5),
        "select_tokens": lambda: ok.select_tokens(scores, k),
        "gather_rows": lambda: ok.gather_rows(x, positions),
        "scatter_rows_": lambda: ok.scatter_rows_(x, positions, rows),
        "scatter_add_rows_": lambda: ok.scatter_add_rows_(x, positions, rows, residual),
        "gather_add_rms_norm": lambda: ok.gather_add_rms_norm(x, positions, rows, weight, 1e-5),
        "silu_and_mul": lambda: ok.silu_and_mul(gate, up),
        "add_low_rank": lambda: ok.add_low_rank(x, low, map_up),
        "apply_rotary_at": lambda: ok.apply_rotary_at(q, cos, sin, positions),
        "apply_rotary_and_cache_": lambda: ok.apply_rotary_and_cache_(
            *kv_cache, slots, *merged, *angles, slots, rotary_dim=HEAD_DIM
        ),
        "sparse_query_attention": lambda: ok.sparse_query_attention(q, keys, values, positions),
        "sparse_query_attention_varlen": lambda: ok.sparse_query_attention_varlen(
            queries, *packed, places, cu_selected, cu_keys
        ),
        "sparse_query_attention_paged": lambda: ok.sparse_query_attention_paged(
            queries, *cache, places, cu_selected, table, lengths
        ),
    }


def spent(run: Callable[[], None], count: int) -> float:
    begin = time.thread_time_ns()
    run()
    return (time.thread_time_ns() - begin) / 1000 / count


def cycle(some: Sequence[Call], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            for call in some:
                call()

    return run


def measured(op: str, prompts: list[dict[str, Call]], rounds: int) -> dict[str, float]:
    """Medians in microseconds; the ways take turns."""
    forget = nothing if PLANS is None else PLANS.forget
    one, many = prompts[0][op], [prompt[op] for prompt in prompts]
    a, b = torch.zeros(1, 1), torch.zeros(1, 1)

    def first() -> None:
        for _ in range(20):
            forget()
            one()

    found: dict[str, list[float]] = {"hit": [], "lengths": [], "traced": [], "first": [], "linear": []}
    cycle(many, 3)()  # all is compiled, and every settings file is read
    for _ in range(rounds):
        cycle([one], 20)()
        found["hit"].append(spent(cycle([one], 200), 200))
        forget()
        one()
        found["traced"].append(spent(one, 1))
        cycle(many, 1)()
        if PLANS is not None:
            PLANS._PLANS.clear()  # the kind of call is known, and the ways it goes; its lengths are not
        found["lengths"].append(spent(cycle(many[1:], 1), len(many) - 1))
        first()  # lets go of all those plans, which takes longer
        found["first"].append(spent(first, 20))
        found["linear"].append(spent(cycle([lambda: torch.nn.functional.linear(a, b)], 200), 200))
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def handed_over(call: Call, plans: str = "1") -> Any:
    """What the launches of a call hand to the driver, with other names for memory that is not the call's."""
    os.environ[PLANS.SWITCH] = plans
    cells: list[Any] = [cell.cell_contents for cell in getattr(call, "__closure__", ())]
    given = {x.data_ptr() for cell in cells for x in (cell if isinstance(cell, list) else [cell]) if torch.is_tensor(x)}
    LAUNCHED.clear()
    call()

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [plain(part) for part in value]
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        if type(value).__name__ == "LazyDict":  # for hooks of launches
            return value.data
        address = type(value) is int and 2**40 < value < 2**48
        return "new memory" if address and value not in given else value

    return plain(LAUNCHED)


def differing(only: str) -> list[str]:
    """Ops of which a launch by plan is another than one without, for its own lengths or for others."""
    found = []
    prompts = [calls(tokens) for tokens in (LENGTHS[0], *CHECKED)]
    for op in prompts[0]:
        if not re.search(only, op):
            continue
        without = [handed_over(prompt[op], "0") for prompt in prompts]
        PLANS.forget()
        handed_over(prompts[0][op])
        handed_over(prompts[0][op])
        by_plan = [handed_over(prompt[op]) for prompt in prompts]
        ways = sum(map(len, PLANS._KINDS.values()))
        print(f"{op:<30}{len(without[0])} launches, {len(prompts)} lengths, {ways} ways", flush=True)
        if by_plan != without or not 0 < ways < len(prompts) or [] in without:
            found.append(op)
            print(f"    without: {without}\n    by plan: {by_plan}")
    return found


def profile(call: Call) -> None:
    import cProfile
    import pstats

    cycle([call], 50)()
    profiler = cProfile.Profile()
    profiler.enable()
    cycle([call], 500)()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def rows_of(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    prompts = [calls(tokens) for tokens in LENGTHS]
    for op in prompts[0]:
        if re.search(options.only, op):
            yield op, measured(op, prompts, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="of the ops those whose name matches")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the medians to this file")
    parser.add_argument("--before", action="store_true", help="in it they are those of the code before")
    parser.add_argument("--check", action="store_true", help="compare launches by plan with others; no times")
    parser.add_argument("--profile", metavar="OP", help="where the time of a hit goes, and nothing else")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import triton

    stand_in_gpu(noted if options.check else nothing)
    cpu_is_the_gpu()
    with torch.no_grad():
        if options.check:
            sys.exit(bool(differing(options.only)))
        if options.profile:
            profile(calls(LENGTHS[0])[options.profile])
            return
        print(f"Triton {triton.__version__}, PyTorch {torch.__version__}; microseconds of CPU time of the thread")
        found = {}
        for op, row in rows_of(options):
            found[op] = row
            print(f"{op:<30}" + "  ".join(f"{name} {value:6.1f}" for name, value in row.items()), flush=True)
    if options.json is not None:
        kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        kept |= {"triton": triton.__version__, "torch": torch.__version__}
        when = "host_before" if options.before else "host"
        kept[when] = kept.get(when, {}) | found
        options.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
