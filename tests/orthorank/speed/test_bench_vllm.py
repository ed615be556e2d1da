"""``orthorank bench --engine vllm`` as far as it goes without vLLM: settings of the engines, and what is refused."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

import orthorank
from orthorank.cli import main
from orthorank.commands import bench_vllm as command
from orthorank.common.errors import OrthoRankError
from orthorank.speed import bench_vllm
from orthorank.speed.bench import BenchSettings
from orthorank.speed.bench_vllm import VLLMReport, engine_arguments
from orthorank.speed.timing import SpeedReport, timings_of

PLAN = orthorank.OrthoRankConfig(layers=[1, 2], keep_ratio=0.25)
WINDOW = orthorank.OrthoRankConfig(layers=[1, 2], select="window", select_window=512)


def test_all_engines_get_what_any_plan_needs() -> None:
    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    settings = BenchSettings(prompt_tokens=300, batch_size=4)
    window = engine_arguments(config, {"dense": None, "window": WINDOW}, settings)
    assert "enable_chunked_prefill" not in window
    assert window["enable_prefix_caching"] is False
    assert window["gpu_memory_utilization"] == pytest.approx(0.45)
    assert window["max_model_len"] == 301
    assert window["max_num_batched_tokens"] == 4 * 301, "all prompts in one step"
    alone = engine_arguments(config, {"dense": None, "window": WINDOW}, BenchSettings(prompt_tokens=300))
    assert alone["max_num_batched_tokens"] == 512, "a window in one step"
    both = engine_arguments(config, {"dense": None, "plan": PLAN, "window": WINDOW}, settings)
    assert both["enable_chunked_prefill"] is False
    bytes_of_a_token = 3 * 2 * 2 * 16 * 4
    assert both["kv_cache_memory_bytes"] >= 4 * 301 * bytes_of_a_token


def test_prompts_begin_with_bos() -> None:
    config = LlamaConfig(vocab_size=40, bos_token_id=7)
    prompts = bench_vllm._prompts(config, BenchSettings(prompt_tokens=20, batch_size=3))
    ids = [prompt["prompt_token_ids"] for prompt in prompts]
    assert [len(each) for each in ids] == [20] * 3
    assert {each[0] for each in ids} == {7}
    assert len({tuple(each) for each in ids}) == 3
    assert max(map(max, ids)) < 40


def report(device: str, attention: dict[str, str | None]) -> VLLMReport:
    timings = timings_of({"dense": [2.0, 4.0], "plan": [1.0, 2.5]}, 40)
    speed = SpeedReport(timings, "wall clock", device, "float32", 1, 2, 20, 2, 1)
    return VLLMReport(BenchSettings(prompt_tokens=20), {}, "0.32.0", "CPU_ATTN", speed, timings, attention)


def test_a_cpu_figure_says_so() -> None:
    told = report("cpu", {"dense": None, "plan": "portable"}).remark
    assert told == (
        "This is a CPU figure: it says nothing about a GPU. Selected queries attended by the portable path."
    )
    assert report("NVIDIA H100", {"dense": None, "plan": "paged"}).remark is None


def test_rows() -> None:
    config = LlamaConfig(num_hidden_layers=4)
    both = {"dense": None, "plan": PLAN}
    results = bench_vllm.results_of("folder", config, both, report("cpu", {"dense": None, "plan": "portable"}))
    dense, plan = results["rows"]
    assert (dense["prefill_speedup"], dense["flop_speedup"], dense["attention"]) == (1.0, 1.0, None)
    assert plan["prefill_speedup"] == pytest.approx((2 / 1 + 4 / 2.5) / 2)
    assert plan["prefill_tokens_per_second"] == pytest.approx(40 / 1.75)
    assert plan["nominal_sparsity"] == pytest.approx(2 * 0.75 / 4)
    assert plan["flop_speedup"] > 1


def test_without_vllm(tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    assert main(["bench", str(tiny_folder), "--engine", "vllm"]) == 2
    error = capsys.readouterr().err
    assert "pip install '.[vllm]' in a checkout" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "sglang"], "engine is 'sglang'; it may be transformers or vllm"),
        (["--vllm-args", "{}"], "vllm_args is for --engine vllm"),
        (["--engine", "vllm", "--decode-tokens", "3"], "--decode-tokens is not for --engine vllm"),
        (["--engine", "vllm", "--lengths", "3"], "--lengths is not for --engine vllm"),
        (["--engine", "vllm", "--threads", "3"], "--threads is not for --engine vllm"),
        (["--engine", "vllm", "--device", "cpu"], "--device is not for --engine vllm"),
        (["--engine", "vllm", "--rounds", "0"], "rounds is 0"),
    ],
)
def test_options_that_do_not_belong(capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert main(["bench", "nowhere", *options]) == 2
    assert words in capsys.readouterr().err


def test_models_that_vllm_does_not_load(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OrthoRankError, match="needs a model: vLLM loads folders"):
        command._model(None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(OrthoRankError, match="is a GGUF file, and vLLM loads folders"):
        command._model(str(tmp_path / "model.gguf"))
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    with pytest.raises(OrthoRankError, match=r"has no \.safetensors file"):
        command._model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(OrthoRankError, match="configuration of model"):
        command._model(str(tmp_path))
    path, revision, config = command._model(str(tiny_folder))
    assert revision is None
    assert (path, config.num_hidden_layers) == (str(tiny_folder), 6)


@pytest.mark.parametrize("words", ["[1]", "eager"])
def test_vllm_args_are_an_object(words: str) -> None:
    with pytest.raises(OrthoRankError, match="vllm_args is"):
        command._arguments(words, None)
    assert command._arguments('{"enforce_eager": true}', "float16") == {"dtype": "float16", "enforce_eager": True}


def test_what_is_set_for_each_variant_is_not_an_argument() -> None:
    with pytest.raises(OrthoRankError, match="hold 'hf_overrides'"):
        bench_vllm._foreign({"hf_overrides": {}})


def test_plans_are_checked_before_an_engine_starts() -> None:
    config: Any = SimpleNamespace(model_type="llama", num_hidden_layers=2, hidden_size=64)
    with pytest.raises(OrthoRankError, match="layers holds 2; the model has layers 0 to 1"):
        bench_vllm._plan_arguments(PLAN, config)


def test_a_step_holds_a_window_beside_the_other_prompts() -> None:
    """Short prompts with wide windows: the engine would refuse a smaller step."""
    plan = orthorank.OrthoRankConfig(layers=[2], select="window", select_window=256)
    config = LlamaConfig(num_hidden_layers=4)
    found = engine_arguments(config, {"plan": plan}, BenchSettings(prompt_tokens=20, batch_size=3))
    assert found["max_num_batched_tokens"] >= 256 + found["max_num_seqs"] - 1
