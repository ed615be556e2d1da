"""What `orthorank bench` writes: one row for each variant, nominal, by FLOPs and measured, as JSON and CSV."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import write_json, write_text
from orthorank.config import OrthoRankConfig
from orthorank.stack.flops import plan_flops, prefill_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from orthorank.models import ModelInfo
    from orthorank.speed.bench import BenchReport
    from orthorank.speed.timing import Timing


def results_of(
    model: "PreTrainedModel", info: "ModelInfo", variants: Mapping[str, OrthoRankConfig | None], report: "BenchReport"
) -> dict[str, Any]:
    """The report with a row for each variant, as JSON stores it.

    A row's ``nominal_sparsity`` is the share of token-layer updates left out, ``flop_speedup`` what FLOPs alone would
    give (`orthorank.stack.flops`; None where they cannot be counted), and the other speed-ups are measured.
    """
    import torch

    rows = [_row(name, plan, model, report) for name, plan in variants.items()]
    plans = {name: plan.to_dict() for name, plan in variants.items() if plan is not None}
    return {
        "model": info.to_dict(),
        "torch": torch.__version__,
        "rows": rows,
        "plans": plans,
        "bench": report.to_dict(),
    }


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write ``bench.json`` and ``bench.csv`` (a line for each variant) into ``folder``."""
    write_json(folder / "bench.json", results)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, fieldnames=list(results["rows"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(results["rows"])
    write_text(folder / "bench.csv", lines.getvalue())


def _row(name: str, plan: OrthoRankConfig | None, model: "PreTrainedModel", report: "BenchReport") -> dict[str, Any]:
    decode = None if report.decode is None else report.decode[name]
    return fields_of(name, plan, model.config, report) | {
        "decode_speedup": None if decode is None else decode.speedup,
        "decode_speedup_spread": None if decode is None else decode.speedup_spread,
        "decode_tokens_per_second": None if decode is None else decode.tokens_per_second,
        "peak_bytes": report.peak_memory[name],
        "break_even": report.break_even.get(name),
    }


def fields_of(name: str, plan: OrthoRankConfig | None, config: Any, report: Any) -> dict[str, Any]:
    """The fields that every engine's row has: `prefill_fields`, and the time to the first token.

    Args:
        config: the model's; report: a `BenchReport` or a `VLLMReport`.
    """
    first = report.first_token[name]
    return prefill_fields(name, plan, config, report.prefill.timings[name], report.settings.prompt_tokens) | {
        "first_token_speedup": first.speedup,
        "first_token_speedup_spread": first.speedup_spread,
        "first_token_seconds": first.median,
    }


def prefill_fields(
    name: str, plan: OrthoRankConfig | None, config: Any, timing: "Timing", tokens: int
) -> dict[str, Any]:
    """A row's fields of the plan's size, and of the prefill of ``tokens``."""
    return {
        "name": name,
        "layers": 0 if plan is None else len(plan.layers),
        "nominal_sparsity": 0.0 if plan is None else plan.nominal_sparsity(config.num_hidden_layers),
        "flop_speedup": flop_speedup_of(config, plan, tokens),
        "prefill_speedup": timing.speedup,
        "prefill_speedup_spread": timing.speedup_spread,
        "prefill_seconds": timing.median,
        "prefill_tokens_per_second": timing.tokens_per_second,
    }


def flop_speedup_of(
    config: Any, plan: OrthoRankConfig | None, tokens: int, ranks: Mapping[int, int] | None = None
) -> float | None:
    """What the FLOPs left out alone would give with prompts of ``tokens``; None where they cannot be counted.

    Args:
        ranks: of maps that the plan has not yet, by layer; None: its own.
    """
    if plan is None:
        return 1.0
    try:
        return prefill_flops(config, tokens) / plan_flops(config, tokens, plan, ranks=ranks)
    except OrthoRankError:  # a kind of model whose FLOPs are not counted
        return None
