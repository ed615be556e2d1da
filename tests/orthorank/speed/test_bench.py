"""`run_bench` and ``orthorank bench``: what is measured, in which phase, and what is written."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import orthorank
from orthorank.cli import main
from orthorank.common.errors import OrthoRankError
from orthorank.speed import bench
from orthorank.speed.bench import BenchSettings, break_even, run_bench, variant_names
from orthorank.speed.memory import memory_meter, peak_bytes

PLAN = orthorank.OrthoRankConfig(layers=[1, 2], keep_ratio=0.25)
SMALL: dict[str, Any] = {"prompt_tokens": 20, "rounds": 2, "decode_tokens": 3, "lengths": (8, 16), "length_rounds": 1}


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return tiny_model("llama")


def test_everything_is_measured_for_every_variant(model: Any) -> None:
    steps: list[tuple[str, int, int]] = []
    variants = {"dense": None, "plan": PLAN}
    report = run_bench(model, variants, BenchSettings(**SMALL), on_step=lambda *step: steps.append(step))
    assert list(report.prefill.timings) == list(report.first_token) == list(report.decode or {}) == ["dense", "plan"]
    assert report.first_token["plan"].tokens == 20
    assert report.decode is not None
    assert report.decode["plan"].tokens == 3
    assert all(len(t.seconds) == 2 for t in [*report.first_token.values(), *report.decode.values()])
    assert {length: list(t) for length, t in report.by_length.items()} == {8: list(variants), 16: list(variants)}
    assert set(report.break_even) == {"plan"}
    assert [s[0] for s in steps] == ["prefill"] * 2 + ["first token and decoding"] * 2 + ["lengths"] * 2
    assert orthorank.handle_of(model) is None
    assert json.loads(json.dumps(report.to_dict()))["break_even"] == report.break_even


def test_prompt_is_prefill_and_the_rest_is_decoding(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's layers update a quarter of the prompt (its last token among them) and every decoded token."""
    seen: list[tuple[int, int]] = []

    def clock(run: Any) -> float:
        handle = orthorank.handle_of(model)
        before = handle.stats[2].tokens_in, handle.stats[2].tokens_updated
        run()
        seen.append((handle.stats[2].tokens_in - before[0], handle.stats[2].tokens_updated - before[1]))
        return 1.0

    monkeypatch.setattr(bench, "clock_of", lambda device: ("fake", clock))
    prompt = bench.random_prompt(model, 1, 20)
    assert bench._time_generation(model, PLAN, prompt, 3) == (1.0, 1.0)
    assert seen == [(20, 5), (3, 3)]


def test_decoding_continues_greedily(model: Any) -> None:
    """What is timed is what `generate()` would do."""
    prompt = bench.random_prompt(model, 1, 20)
    fed: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: fed.extend(args[0][0].tolist()))
    bench._time_generation(model, PLAN, prompt, 4)
    timed = fed[20:]
    with orthorank.apply(model, PLAN):
        generated = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert timed == generated[0, 20:].tolist()


def test_the_cache_is_passed_by_its_name(model: Any) -> None:
    """transformers 5.24 calls it `cache`, and warns of the name before."""
    seen: list[Any] = []

    class Renamed(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any, cache: Any, use_cache: bool, logits_to_keep: int) -> Any:
            seen.append(cache)
            return super().forward(input_ids, past_key_values=cache, logits_to_keep=logits_to_keep)

    model.__class__ = Renamed
    bench._time_generation(model, None, bench.random_prompt(model, 1, 20), 2)
    assert [each.get_seq_length() for each in seen] == [22, 22, 22], "one cache, of the prompt and two tokens"


def test_peak_memory_sees_an_allocation() -> None:
    if memory_meter(torch.device("cpu")) is None:
        pytest.skip("this system does not tell a process its peak memory")
    small = peak_bytes(lambda: torch.zeros(1), torch.device("cpu"))
    if small is None:
        pytest.skip("this container does not let a process reset its peak memory")
    large = peak_bytes(lambda: torch.ones(64 * 2**20), torch.device("cpu"))  # 256 MiB, which glibc maps and returns
    again = peak_bytes(lambda: torch.zeros(1), torch.device("cpu"))
    assert large is not None
    assert again is not None
    assert large - small > 200 * 2**20
    assert again < large - 200 * 2**20, "the peak before is forgotten"


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [({8: 1.2, 16: 1.3}, 8), ({8: 0.5, 16: 1.0}, 16), ({8: 1.2, 16: 0.99}, None), ({}, None)],
)
def test_break_even(speedups: dict[int, float], expected: int | None) -> None:
    assert break_even(speedups) == expected


def test_names_say_what_a_plan_is() -> None:
    removed = orthorank.OrthoRankConfig(layers=[1], keep_ratio=0)
    assert variant_names([PLAN, removed, PLAN]) == ["orthorank", "layer pruning", "orthorank 2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt_tokens": 1}, "prompt_tokens is 1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"decode_tokens": -1}, "decode_tokens is -1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"lengths": (1,)}, "a prompt length in lengths is 1"),
        ({"prompt_tokens": 600}, "603 tokens .* at most 512"),
    ],
)
def test_errors(model: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        run_bench(model, {"dense": None}, BenchSettings(**(SMALL | arguments)))


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = orthorank.OrthoRankConfig(layers=[2, 3], keep_ratio=0.5).save_pretrained(tmp_path / "plan")
    removed = orthorank.OrthoRankConfig(layers=[2], keep_ratio=0).save_pretrained(tmp_path / "removed")
    options = ["--prompt-tokens", "32", "--rounds", "1", "--decode-tokens", "2", "--lengths", "8,16", "--device", "cpu"]
    files = ["--plan", str(plan), "--plan", str(removed.parent)]
    assert main(["bench", str(tiny_folder), *files, *options, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "layer pruning" in shown
    assert "by wall clock" in " ".join(shown.split())
    assert "in one round, which has no spread; worth it" in " ".join(shown.split()) or "no spread; slower" in shown
    assert "±" not in shown
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["dense", "orthorank", "layer pruning"]
    assert written["rows"][1]["nominal_sparsity"] == pytest.approx(2 * 0.5 / 6)
    assert written["rows"][2]["flop_speedup"] > 1
    rows = list(csv.DictReader((tmp_path / "out" / "bench.csv").open()))
    assert [row["name"] for row in rows] == ["dense", "orthorank", "layer pruning"]
    assert float(rows[1]["prefill_seconds"]) == written["rows"][1]["prefill_seconds"]


def test_figures_are_seen_though_they_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orthorank.commands.bench_shared import deliver

    results = {"rows": [{"name": "dense"}]}
    with pytest.raises(OrthoRankError, match="cannot be written"):
        deliver(None, results, tmp_path / "gone", as_json=False, show=lambda *_: print("a table"))
    assert capsys.readouterr().out == "a table\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--plan", "nowhere"], "no plan can be read at nowhere"),
        (["--lengths", "a"], "--lengths is 'a'; it must be numbers of tokens such as 128,512, or 0 for none"),
        (["--rounds", "0"], "rounds is 0"),
        (["--threads", "0"], "threads is 0"),
        ([], "--plan"),
    ],
)
def test_the_command_says_what_is_wrong(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["bench", str(tiny_folder), "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
