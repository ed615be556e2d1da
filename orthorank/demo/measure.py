"""Perplexity, prefill speed and answers of the dense model and of the plans."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from orthorank.analysis.token_map import token_map
from orthorank.common import format as form
from orthorank.common.files import finite
from orthorank.common.paired import paired
from orthorank.config import OrthoRankConfig
from orthorank.demo.correct import Plans
from orthorank.demo.run import Run
from orthorank.evaluation import perplexity, plan_speedup, time_prefill
from orthorank.evaluation.compare import compare_plans
from orthorank.hf.apply import apply
from orthorank.report import words
from orthorank.speed.bench import random_prompt

ANSWER_TOKENS = 32  # at most, of the answer to a prompt
MAP_TOKENS = 200  # of the token map: as much as one looks at

Variants = dict[str, OrthoRankConfig | None]
PAIRS = (  # rows that are compared, beside each with the dense one
    ("orthorank", "layer-pruning"),
    ("orthorank-corrected", "layer-pruning-corrected"),
    ("layer-pruning-corrected", "layer-pruning"),
    ("orthorank-corrected", "orthorank"),
)


def quality(run: Run, plans: Plans) -> None:
    """Fill in the rows of the results but their speed. Rows are saved as they grow."""
    variants = _variants(plans)
    run.results["rows"] = [_row(run, name, plan) for name, plan in variants.items()]
    run.save()
    with run.timed("perplexity"):
        _add_perplexity(run, variants)


def speed(run: Run, plans: Plans) -> None:
    """Fill in the speed of the rows, the token map, and each plan's ``measured``."""
    with run.timed("speed"):
        _add_speed(run, _variants(plans))
    _add_token_map(run, plans["orthorank"])
    for name, plan in plans.items():
        plan.measured = _measured(run, name)
        run.save_plan(name, plan)
    run.save()


def answers(run: Run, plans: Plans) -> None:
    """The answers of the dense model and of the plans to the prompts, and how far apart they are."""
    named = {words.TITLES[name]: plan for name, plan in _variants(plans).items() if plan is not None}
    with run.timed("answers"), run.screen.progress("answers", len(run.prompts)) as advance:
        found = compare_plans(
            run.model,
            run.tokenizer,
            named,
            run.prompts,
            max_new_tokens=ANSWER_TOKENS,
            bos=run.settings.bos,
            on_prompt=lambda done, _: advance(done, ""),
        )
    run.results["compare"] = {"max_new_tokens": ANSWER_TOKENS, "text": None} | found
    run.save()


def _variants(plans: Plans) -> Variants:
    return {"dense": None} | {name: plans[name] for name in words.TITLES if name in plans}


def _row(run: Run, name: str, plan: OrthoRankConfig | None) -> dict[str, Any]:
    """A row with what is known before anything is measured."""
    return {
        "name": name,
        "layers": [] if plan is None else plan.layers,
        "keep_ratio": 1.0 if plan is None else plan.keep_ratio,
        "keep_ratios": {} if plan is None else plan.to_dict()["keep_ratios"],
        "nominal_sparsity": 0.0 if plan is None else plan.nominal_sparsity(run.info.num_hidden_layers),
        "perplexity": None,
        "above_dense": None,
        "tokens_per_second": None,
        "speedup": None,
        "flop_speedup": 1.0 if plan is None else plan_speedup(run.model.config, _prompt_tokens(run), plan),
    }


def _add_perplexity(run: Run, variants: Variants) -> None:
    ids = run.held_out
    losses: dict[str, Sequence[float]] = {}
    with run.screen.progress("perplexity", len(variants) * len(ids)) as advance:
        for number, (row, plan) in enumerate(zip(run.results["rows"], variants.values(), strict=True)):
            before, title = number * len(ids), words.TITLES[row["name"]]

            def on_window(done: int, _: int, value: float, before: int = before, title: str = title) -> None:
                advance(before + done, f"{title}: {form.figure(value)}")

            with nullcontext() if plan is None else apply(run.model, plan):
                result = perplexity(run.model, ids, on_window=on_window)
            row["perplexity"], row["loss_standard_error"] = result.perplexity, result.standard_error
            losses[row["name"]] = result.window_losses
            run.results["quality"] = {
                "windows": result.windows,
                "seq_len": result.window,
                "ids_sha256": result.ids_sha256,
                "window_losses": losses,
                "differences": _differences(losses),
            }
            if plan is not None:
                row["above_dense"] = _above(losses[row["name"]], losses["dense"])
            run.save()


def _add_speed(run: Run, variants: Variants) -> None:
    rounds, prompt = run.settings.rounds, random_prompt(run.model, 1, _prompt_tokens(run))
    with run.screen.progress("prefill speed", rounds) as advance:
        report = time_prefill(
            run.model, variants, prompt, rounds=rounds, on_round=lambda done, total: advance(done, f"of {total} rounds")
        )
    for row in run.results["rows"]:
        timing = report.timings[row["name"]]
        row["tokens_per_second"], row["speedup"] = timing.tokens_per_second, timing.speedup
        row["speedup_spread"] = timing.speedup_spread
    run.results["speed"] = report.to_dict()


def _add_token_map(run: Run, plan: OrthoRankConfig) -> None:
    """Which layers updated which token, at the beginning of the held-out text."""
    if not getattr(run.tokenizer, "is_fast", False):
        return
    text = run.tokenizer.decode(run.held_out[0][:MAP_TOKENS], skip_special_tokens=True)
    run.results["token_map"] = token_map(run.model, run.tokenizer, plan, text, MAP_TOKENS).to_dict()
    run.save()


def _prompt_tokens(run: Run) -> int:
    return min(run.settings.prompt_tokens, run.info.max_tokens)


def _measured(run: Run, name: str) -> dict[str, Any]:
    """What a plan file says of its own run."""
    row, dense = (words.row_of(run.results, which) or {} for which in (name, "dense"))
    return {
        "perplexity": row["perplexity"],
        "dense_perplexity": dense["perplexity"],
        "speedup": row["speedup"],
        "flop_speedup": row["flop_speedup"],
        "text": f"{run.calibration.text.name} (held-out part)",
        "prompt_tokens": _prompt_tokens(run),
        "device": run.results["speed"]["device"],
        "dtype": run.results["speed"]["dtype"],
    }


def _differences(losses: dict[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Each pair of rows that is measured: the mean difference of their losses, in nats a token."""
    pairs = [(of, against) for of, against in PAIRS if {of, against} <= set(losses)]
    return [{"of": of, "against": against} | _above(losses[of], losses[against]) for of, against in pairs]


def _above(losses: Sequence[float], others: Sequence[float]) -> dict[str, float | None]:
    """The mean of ``losses - others`` over windows, and its standard error; None for a single window."""
    mean, error = paired(others, losses)
    found: dict[str, float | None] = finite({"mean": mean, "standard_error": error})
    return found
