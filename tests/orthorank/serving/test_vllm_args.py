"""``orthorank vllm-args``: the arguments of vLLM for a plan, and plans that no server can serve."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orthorank import OrthoRankConfig
from orthorank.cli import main
from orthorank.common.errors import OrthoRankError
from orthorank.serving.vllm.arguments import command_line, config_of
from orthorank.serving.vllm.checks import plan_obstacles
from orthorank.serving.vllm.serving import Serving

MODEL = {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 64}
THRESHOLD: dict[str, Any] = {"select": "threshold", "thresholds": {2: 0.5, 3: 0.25}}
WINDOW: dict[str, Any] = {"select": "window", "select_window": 48}


def plan_file(folder: Path, **fields: Any) -> str:
    plan = OrthoRankConfig(**({"layers": [2, 3], "calibration": {"method": "by hand"}} | MODEL | fields))
    return str(plan.save_pretrained(folder))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["vllm-args", *arguments]) == 0
    return capsys.readouterr().out


def as_keywords(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    return json.loads(printed(capsys, *arguments, "--python"))


def test_the_line_survives_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = printed(capsys, plan_file(tmp_path, model_id="it's $HOME"), "--scores", "first rank")
    assert line.count("\n") == 1
    shell = subprocess.run(["sh", "-c", "eval \"printf '%s\\n' $1\"", "sh", line], capture_output=True, text=True)
    words = shell.stdout.splitlines()
    assert words[0] == "--hf-overrides"
    assert words[2:] == ["--no-enable-chunked-prefill", "--no-enable-prefix-caching"]
    overrides = json.loads(words[1])
    assert overrides["architectures"] == ["OrthoRankLlamaForCausalLM"]
    assert overrides["orthorank"]["plan"]["model_id"] == "it's $HOME"
    assert overrides["orthorank"]["scores"] == "first rank"


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        ({}, [], {"enable_chunked_prefill": False, "enable_prefix_caching": False}),
        ({"keep_ratio": 0.0}, [], {}),
        ({"keep_ratio": 1.0}, ["--no-prefix-caching"], {"enable_prefix_caching": False}),
        (THRESHOLD, [], {}),
        (THRESHOLD, ["--no-prefix-caching", "--block-size", "16"], {"enable_prefix_caching": False, "block_size": 16}),
        (WINDOW, [], {"block_size": 96}),
        (WINDOW, ["--block-size", "48"], {"block_size": 48}),
        (WINDOW, ["--reuse", "all"], {}),
        (WINDOW, ["--no-prefix-caching", "--block-size", "64"], {"enable_prefix_caching": False, "block_size": 64}),
        (WINDOW | {"select_window": 4096}, [], {"block_size": 4096, "max_num_batched_tokens": 5120}),
    ],
)
def test_what_each_way_to_select_asks_of_vllm(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    options: list[str],
    expected: dict[str, Any],
) -> None:
    file = plan_file(tmp_path, **fields)
    found = as_keywords(capsys, file, *options)
    overrides = found.pop("hf_overrides")
    assert found == expected
    serving = Serving.of(overrides["orthorank"])
    wanted = OrthoRankConfig.from_pretrained(file)
    wanted.calibration = {}  # where a plan came from is left out
    assert serving.plan == wanted
    words = shlex.split(printed(capsys, file, *options))
    assert len([word for word in words if word.startswith("--")]) == 1 + len(expected)


def test_options_reach_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"threshold_count": "capacity", "reuse": "all", "attention": "portable", "scores": "first rank"}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    given = as_keywords(capsys, plan_file(tmp_path, **THRESHOLD), *words)["hf_overrides"]["orthorank"]
    serving = Serving.of(given)
    assert {name: getattr(serving, name) for name in options} == options
    assert serving.plan.thresholds == THRESHOLD["thresholds"]


def test_the_model_says_its_type(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = str(OrthoRankConfig(layers=[2]).save_pretrained(tmp_path))
    found = as_keywords(capsys, bare, "--model", str(tiny_folder))
    assert found["hf_overrides"]["architectures"] == ["OrthoRankLlamaForCausalLM"]


REFUSED: list[dict[str, Any]] = [
    {"layers": []},
    {"criterion": "random"},
    {"kv": "selected"},
    {"update_sink": True},
    {"sinks": "auto"},
    {"layers": [0, 2]},
    {"sink_layer": 2},
    THRESHOLD | {"decode": "threshold"},
]


@pytest.mark.parametrize("fields", REFUSED, ids=lambda fields: next(iter(fields)))
def test_plans_that_no_server_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    file = plan_file(tmp_path, **fields)
    sentence = next(plan_obstacles(Serving(OrthoRankConfig.from_pretrained(file))))
    assert main(["vllm-args", file]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *warned, refused = err.splitlines()
    assert refused == f"orthorank: {sentence}"
    assert all(line.startswith("orthorank: warning: this plan names no layers") for line in warned)


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({"model_type": None}, [], "name the model's folder with --model"),
        ({"model_type": "phi3"}, [], "the model's type is 'phi3'; OrthoRank serves llama, mistral, qwen2, qwen3"),
        ({"num_hidden_layers": 7}, ["--model", "FOLDER"], "num_hidden_layers 7 and this one has 6"),
        ({}, ["--model", "nowhere"], "name the folder of a checkpoint"),
        ({}, ["--reuse", "none"], "reuse is 'none'; it may be 'prompt' or 'all'"),
        ({}, ["--block-size", "0"], "block_size is 0"),
        (WINDOW, ["--block-size", "64"], "use a multiple of the window, such as 96"),
    ],
)
def test_other_refusals(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    options: list[str],
    words: str,
) -> None:
    options = [str(tiny_folder) if option == "FOLDER" else option for option in options]
    assert main(["vllm-args", plan_file(tmp_path, **fields), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[", '["a list"]', '{"model_type": "llama"}'])
def test_a_folder_with_another_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(OrthoRankError, match=r"config\.json"):
        config_of(tmp_path)


def test_true_is_an_option_without_no() -> None:
    assert command_line({"enforce_eager": True, "block_size": 32}) == "--enforce-eager --block-size 32"


@pytest.mark.parametrize("file", ["docs/vllm.md", "README.md", "orthorank/commands/vllm_args.py"])
def test_nothing_is_served_where_there_are_no_arguments(file: str) -> None:
    """Of the line that is shown: a server without the plan would be a dense one."""
    said = (Path(__file__).parents[3] / file).read_text()
    line = re.search(r'(?:args=\$\(|eval ").*vllm serve .*?"', said)
    assert line is not None
    fails, serves = "orthorank() { return 2; }", "vllm() { echo served; }"
    for orthorank, printed in ((fails, ""), ("orthorank() { :; }", "served\n")):
        done = subprocess.run(["sh", "-c", f"{orthorank}; {serves}; {line[0]}"], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == (printed, "")
