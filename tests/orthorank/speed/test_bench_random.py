"""``orthorank bench --random-weights``: what is measured, how often layers are compiled, what is refused."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from orthorank import OrthoRankConfig, OrthoRankError, apply, handle_of
from orthorank.cli import main
from orthorank.speed.bench import BenchSettings
from orthorank.speed.bench_random import bench_random
from orthorank.speed.prefill_ways import Ways, compiled_layers
from orthorank.speed.random_weights import random_model
from tests.orthorank.speed.test_random_weights import IDS, TINY

SMALL = BenchSettings(prompt_tokens=12, rounds=2, decode_tokens=0, lengths=())
PLAN = OrthoRankConfig(layers=[2, 3, 4], keep_ratio=1 / 3)


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"num_hidden_layers": 10}), encoding="utf-8")
    return str(file)


@pytest.fixture
def model(config: str) -> Any:
    return random_model(config, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """A compiler that counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


def test_one_compilation_serves_all_dense_layers_and_one_more_those_that_select(model: Any) -> None:
    backend = Counted()
    variants = {"dense": None, "plan": PLAN, "pruned": OrthoRankConfig(layers=[1, 5], keep_ratio=0)}
    eager, compiled = Ways(model, variants, IDS), Ways(model, variants, IDS, compiled=True, backend=backend)
    counts = []
    with torch.inference_mode():
        for name in variants:
            with eager.running(name) as run:
                expected = run()
            with compiled.running(name) as run:
                torch.testing.assert_close(run(), expected)
            counts.append(backend.graphs)
        with compiled.running("plan") as run:
            run()
    assert counts == [1, 2, 3], "10 dense layers: 1; 3 that select: 1 more; 2 pruned: 1 that counts them"
    assert backend.graphs == 3, "a plan that is applied again needs none"


def test_plans_of_one_ratio_share_their_compilation(model: Any) -> None:
    backend = Counted()
    plans = {"10 %": OrthoRankConfig(layers=[8], keep_ratio=1 / 3), "20 %": PLAN}
    ways = Ways(model, plans, IDS, compiled=True, backend=backend)
    with torch.inference_mode():
        for name in plans:
            with ways.running(name) as run:
                run()
    assert backend.graphs == 2


def test_counts_of_a_compiled_plan_are_those_of_an_eager_one(model: Any) -> None:
    with apply(model, PLAN) as handle, compiled_layers(model, Counted()), torch.inference_mode():
        model(IDS, use_cache=False)
        assert [handle.stats[layer].tokens_updated for layer in PLAN.layers] == [8, 8, 8]
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_every_variant_has_a_row(model: Any) -> None:
    steps: list[Any] = []
    results = bench_random(model, {"dense": None, "plan": PLAN}, SMALL, on_step=lambda *step: steps.append(step))
    rows = results["rows"]
    assert [row["name"] for row in rows] == ["dense", "plan"]
    assert rows[0]["flop_speedup"] == rows[0]["prefill_speedup"] == 1
    assert rows[1]["flop_speedup"] > 1
    assert rows[1]["nominal_sparsity"] == pytest.approx(0.2)
    assert "says nothing about quality" in results["remark"]
    assert (results["attention"], results["graph"], results["compiled"]) == ("sdpa_causal", False, False)
    assert steps == [("prefill", 1, 2), ("prefill", 2, 2)]
    assert handle_of(model) is None
    with pytest.raises(OrthoRankError, match="variants is empty"):
        bench_random(model, {}, SMALL)


def test_a_graph_needs_a_gpu_and_says_so(model: Any, config: str, capsys: Any) -> None:
    with pytest.raises(OrthoRankError, match=r"the model is on cpu; CUDA graphs are of GPUs"):
        bench_random(model, {"dense": None}, SMALL, graph=True)
    assert main(["bench", "--random-weights", config, "--graph", "--device", "cpu"]) == 2
    assert "--graph is asked for and the device is cpu; CUDA graphs are of GPUs" in capsys.readouterr().err


def test_the_command_measures_and_says_what_it_did_not(config: str, tmp_path: Path, capsys: Any) -> None:
    arguments = ["bench", "--random-weights", config, "--prompt-tokens", "12", "--rounds", "1", "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    dense = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["dense"])
    assert dense[4:7] == ["1.00x", "1.00x", "-"], "one round has no spread"
    said = " ".join(shown.split())
    assert "The weights are random: this is speed and memory alone, and says nothing about quality." in said
    assert "the last ones before the final layer" in said
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    names = ["dense", "layer pruning 10 %", "orthorank 10 %", "layer pruning 20 %", "orthorank 20 %"]
    assert [row["name"] for row in written["rows"]] == names
    assert [written["plans"][name]["layers"] for name in names[1:]] == [[8], [8], [7, 8], [6, 7, 8]]
    rows = list(csv.DictReader((tmp_path / "out" / "bench.csv").open()))
    assert [row["name"] for row in rows] == names
    assert main([*arguments, "--model-layers", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_hidden_layers"] == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--random-weights", "llama-9"], "config 'llama-9' is no file; name a config.json"),
        (["a-model", "--random-weights", "llama-3-8b"], "model is not for --random-weights: the model is made from"),
        (["--random-weights", "llama-3-8b", "--lengths", "8"], "--lengths is not for --random-weights: one length"),
        (["--random-weights", "llama-3-8b", "--decode-tokens", "8"], "--decode-tokens is not for --random-weights"),
        (["--graph"], "--graph is for --random-weights; leave it out"),
        (["--compile"], "--compile is for --random-weights; leave it out"),
        (["--model-layers", "3"], "--model-layers is for --random-weights; leave it out"),
        (["--engine", "vllm", "--random-weights", "llama-3-8b"], "--random-weights is not for --engine vllm"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], sentence: str, capsys: Any) -> None:
    assert main(["bench", *arguments]) == 2
    assert sentence in capsys.readouterr().err
