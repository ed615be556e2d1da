"""``orthorank estimate``: on Llama-3-8B by hand, against the ops that a real model counts, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, fit_correction
from orthorank.cli import main
from orthorank.correction import FILE_NAME as MAPS
from orthorank.evaluation import estimate
from orthorank.speed.estimates import find_config
from tests.orthorank.models import MODELS, tiny

LAYERS, D, Q, C, M, V = 32, 4096, 4096, 1024, 14336, 128256  # of Llama-3-8B
N, K = 2048, 682  # a prompt, and what a layer at 1/3 updates of it


@pytest.fixture
def llama3_8b(tmp_path: Path) -> Path:
    """As the hub has it, shortened."""
    fields = {
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": M,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": V,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *command: Any) -> dict[str, Any]:
    assert main(["estimate", *map(str, command), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def sentence(capsys: pytest.CaptureFixture[str], *command: Any) -> str:
    assert main(["estimate", *map(str, command)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    return said.err


def layer(updated: int) -> int:
    """FLOPs of a layer of Llama-3-8B: keys and values of all, the rest of what is updated."""
    return 4 * N * D * C + 4 * updated * D * Q + 4 * Q * updated * N // 2 + 6 * updated * D * M


def test_llama_3_8b_by_hand(llama3_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, llama3_8b, "--prompt", N, "--sparsity", 0.1, "--rank", 64)
    weights = 2 * V * D + LAYERS * (2 * D * D + 2 * D * C + 3 * D * M + 2 * D) + D
    assert found["parameters"] == weights == 8_030_261_248
    assert found["weight_bytes"]["bfloat16"] == 2 * weights
    head, maps = 2 * D * V, 4 * (2 * N * 64 * 2 * D)
    dense, plan = LAYERS * layer(N) + head, 28 * layer(N) + 4 * layer(K) + head + maps
    (row,) = found["rows"]
    assert (row["prompt"], row["dense_flops"], row["plan_flops"], row["map_flops"]) == (N, dense, plan, maps)
    assert row["flop_bound"] == pytest.approx(dense / plan)
    assert row["dense_cache_bytes"] == row["plan_cache_bytes"] == 256 * 2**20
    assert found["plan"]["nominal_sparsity"] == pytest.approx(4 * (2 / 3) / 32)
    assert (found["maps"]["rank"], len(found["maps"]["layers"])) == (64, 4)
    assert found["maps"]["bytes"] == 4 * 4 * (2 * 64 * D + D)
    assert found["maps"]["flops_per_token"] * N == maps


def test_removed_layers_keep_no_keys(llama3_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, llama3_8b / "config.json", "--sparsity", 0.2, "--keep-ratio", 0, "--dtype", "float32")
    assert [row["prompt"] for row in found["rows"]] == [512, 2048, 8192], "as far as the model goes"
    for row in found["rows"]:
        assert row["dense_cache_bytes"] == 4 * 2 * C * LAYERS * row["prompt"]
        assert row["plan_cache_bytes"] * LAYERS == row["dense_cache_bytes"] * (LAYERS - 6)
        head = 2 * D * V
        assert row["plan_flops"] - head == pytest.approx((row["dense_flops"] - head) * 26 / 32)
    assert found["maps"] is None


def test_the_plan_that_is_named(llama3_8b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = OrthoRankConfig(layers=[3, 5], keep_ratio=1 / 3, keep_ratios={5: 0.0}, num_hidden_layers=LAYERS)
    plan.save_pretrained(tmp_path / "plan")
    found = answer(capsys, llama3_8b, "--prompt", N, "--plan", tmp_path / "plan")
    assert found["rows"][0]["plan_flops"] == 30 * layer(N) + layer(K) + 2 * D * V
    assert found["plan"]["keep_ratios"] == {"5": 0.0}
    assert main(["estimate", str(llama3_8b), "--plan", str(tmp_path / "plan")]) == 0
    said = capsys.readouterr().out
    assert "8.03 billion weights: 14.96 GiB in bfloat16" in said
    assert "OrthoRank: 2 layers changed, 1 at 1/3, 1 removed (3, 5)" in said


def test_the_maps_of_a_plan_are_counted_as_they_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama-2")
    model.save_pretrained(tmp_path / "model")
    plan = OrthoRankConfig(layers=[1, 2], keep_ratio=0.5, keep_ratios={2: 0.0})
    fitted = fit_correction(model, torch.arange(240).view(8, 30) % 64, plan, rank=4)
    fitted.save_pretrained(tmp_path / "plan")
    found = answer(capsys, tmp_path / "model", "--plan", tmp_path / "plan", "--prompt", 40)
    stored = (tmp_path / "plan" / MAPS).stat().st_size
    assert found["maps"]["bytes"] < stored < found["maps"]["bytes"] + 2000, "the tensors, and the file's head"
    again = ("--plan", tmp_path / "plan", "--rank", 8)
    assert "the plan has maps of rank 4; leave rank out" in sentence(capsys, tmp_path / "model", *again)


def test_short_prompts_meet_no_map_of_a_selecting_layer() -> None:
    plan = OrthoRankConfig(layers=[1, 2], keep_ratio=0.5, keep_ratios={2: 0.0}, min_prompt=40)
    config = tiny("llama-2").config
    short, long = estimate(config, prompts=[39, 40], plan=plan, rank=4)["rows"]
    hidden = config.hidden_size
    assert (short["map_flops"], long["map_flops"]) == (4 * 39 * 4 * hidden, 2 * 4 * 40 * 4 * hidden)


@pytest.mark.parametrize("family", ["llama-2", "gemma-2", "qwen2-moe-step"])
def test_the_weights_are_those_of_a_model_that_is_made(family: str) -> None:
    model = tiny(family)
    found = estimate(model.config, prompts=[8], sparsity=0.5)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["alike"] is (family == "llama-2")


def test_a_sliding_window_bounds_the_cache() -> None:
    config = find_config("mistral-7b")
    config.sliding_window = 1024
    short, long = estimate(config, prompts=[512, 4096])["rows"]
    assert long["dense_cache_bytes"] == 2 * short["dense_cache_bytes"]


def test_where_a_configuration_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_config("llama").hidden_size == 4096, "a model type: transformers' defaults"
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--small" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    tiny("llama-2").config.save_pretrained(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert find_config("someone/small").to_dict().keys() >= {"hidden_size", "num_hidden_layers"}
    with pytest.raises(OrthoRankError, match=r"no model in the local cache of the hub.*nothing is downloaded"):
        find_config("someone/else")


def test_the_packaged_model_is_found_by_its_id(smollm2: Any) -> None:
    found = estimate(find_config("HuggingFaceTB/SmolLM2-135M-Instruct"), prompts=[64])
    assert found["parameters"] == sum(p.numel() for p in smollm2[0].parameters()) == 134_515_008


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "0"], "prompt is 0; it must be an integer, 1 or more"),
        (["--prompt", "9000"], "prompt is 9000; the model's longest input has 8192 tokens"),
        (["--sparsity", "1"], "sparsity is 1; it must be above 0 and below 1"),
        (["--sparsity", "0.01"], "sparsity is 0.01, which is less than one layer of 32 with keep ratio 0.3333"),
        (["--sparsity", "0.9"], "lower the sparsity to at most 0.6667"),
        (["--keep-ratio", "1"], "keep_ratio is 1; it must be from 0 to below 1"),
        (["--rank", "5000"], "rank is 5000; it must be an integer from 1 to 4,096"),
        (["--dtype", "int8"], "dtype is 'int8'; it may be float32, bfloat16 or float16"),
        (["--plan", "no-such-plan"], "plan is 'no-such-plan', and there is no such file or folder"),
        (["--plan", "PLAN", "--sparsity", "0.1"], "both a plan and sparsity say what is left out"),
        (["--plan", "PLAN", "--keep-ratio", "0"], "both a plan and keep_ratio say what is left out"),
        (["--plan", "PLAN"], "the plan was made for a model with num_hidden_layers 30"),
    ],
)
def test_what_is_refused(llama3_8b: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    plan = OrthoRankConfig(layers=[3], num_hidden_layers=30).save_pretrained(llama3_8b / "plan")
    given = [str(plan) if option == "PLAN" else option for option in options]
    assert words in sentence(capsys, llama3_8b, *given)


def test_what_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "is of type 'bert', which has no spec" in sentence(capsys, tmp_path)
    assert "nothing is downloaded" in sentence(capsys, "no such model !")


def test_every_family_has_an_estimate() -> None:
    for family in MODELS:
        found = estimate(tiny(family).config, prompts=[16], sparsity=0.5, rank=2)
        assert found["rows"][0]["flop_bound"] > 1, family
