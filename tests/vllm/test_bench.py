"""``orthorank bench --engine vllm``: two engines in turn, on a tiny model."""

import csv
import json
from pathlib import Path

import pytest

from orthorank import OrthoRankConfig
from orthorank.cli import main

pytestmark = pytest.mark.vllm
EAGER = ["--vllm-args", '{"enforce_eager": true, "block_size": 32}']


def test_dense_and_plan_in_turn(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = OrthoRankConfig(layers=[1, 2], keep_ratio=0.25).save_pretrained(tmp_path / "plan")
    options = ["--engine", "vllm", "--prompt-tokens", "70", "--batch-size", "3", "--rounds", "2", "--dtype", "float32"]
    arguments = ["bench", str(llama), "--plan", str(plan), *options, *EAGER, "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Selected queries attended by the portable path" in shown
    assert "This is a CPU figure" in shown
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    bench = written["bench"]
    assert bench["engine_arguments"]["enable_chunked_prefill"] is False
    assert bench["attention"] == {"dense": None, "orthorank": "portable"}
    assert (bench["attention_backend"], bench["prefill"]["device"]) == ("CPU_ATTN", "cpu")
    assert bench["prefill"]["timings"]["dense"]["tokens"] == 210
    assert bench["first_token"]["dense"]["tokens"] == 70
    for row in written["rows"]:
        assert row["prefill_seconds"] > 0
        assert row["first_token_seconds"] > 0
    assert [row["nominal_sparsity"] for row in written["rows"]] == [0, pytest.approx(0.375)]
    rows = list(csv.DictReader((tmp_path / "out" / "bench.csv").open()))
    assert [row["name"] for row in rows] == ["dense", "orthorank"]


def test_a_folder_that_vllm_does_not_load(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    plan = OrthoRankConfig(layers=[1]).save_pretrained(tmp_path / "plan")
    arguments = ["bench", str(tmp_path), "--plan", str(plan), "--engine", "vllm", "--prompt-tokens", "64", *EAGER]
    assert main(arguments) == 2
    assert f"vLLM does not start with the model {str(tmp_path)!r}" in capsys.readouterr().err
