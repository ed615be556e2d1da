"""The command line as people run it: exit codes, and one sentence where something is wrong."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from orthorank import OrthoRankError, cli

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A real process; slow to start, so few tests use it."""
    command = [sys.executable, "-m", "orthorank", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, cwd=ROOT, timeout=300, check=False
    )


@pytest.fixture
def orthorank(capsys):
    """``orthorank(*arguments)`` in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_and_version_need_neither_torch_nor_transformers():
    """The packages' own __init__ files stand aside: what the command line itself imports is looked at."""
    script = """
import sys, types
for name in ("orthorank", "orthorank_kernels"):
    package = types.ModuleType(name)
    package.__path__ = [name]
    sys.modules[name] = package
from orthorank.cli import main
assert main(["--help"]) == main(["demo", "--help"]) == main(["--version"]) == main([]) == 0
assert main(["search", "--help"]) == 0
assert main(["search", "--keep-ratio", "2"]) == main(["search", "--method", "one-shot", "--fast"]) == 2
heavy = {"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert "doctor" in done.stdout
    assert "--keep-ratio" in done.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["eval", "ppl", "--plan", ""], "--plan is empty; give it a value"),
        (["eval", "ppl", "--json", "--text="], "--text is empty; give it a value"),
        (["doctor", "model", ""], "an argument of doctor is empty"),
        ([""], "an argument of orthorank is empty"),
    ],
)
def test_an_empty_word_is_a_variable_that_is_not_set(line, said, orthorank):
    """Which would otherwise be the present folder."""
    code, out, err = orthorank(*line)
    assert (code, out) == (2, "")
    assert err.startswith(f"orthorank: {said}")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": []}, "this plan names no layers: with it a model is the dense one"),
        ({"version": "99.0"}, "this plan was written by version 99.0, and this is"),
        ({"kep_ratio": 0.5}, "does not know and ignores: kep_ratio; check the spelling"),
        ({"kep_ratio": 0.5, "version": "99.0"}, "ignores: kep_ratio; a newer version may follow them"),
    ],
)
def test_a_warning_is_a_line_without_a_place_in_the_code(fields, said, tmp_path, orthorank):
    (tmp_path / "plan.json").write_text(json.dumps({"layers": [1]} | fields))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = orthorank("estimate", "llama-3-8b", "--prompt", "512", "--plan", str(tmp_path / "plan.json"))
    assert code == 0
    assert any(line.startswith("orthorank: warning: ") and said in line for line in err.splitlines())
    assert ".py" not in err


def test_a_configuration_of_another_shape(tmp_path, orthorank):
    for content in ('["llama"]', '{"model_type": ["llama"]}'):
        (tmp_path / "list.json").write_text(content)
        code, _, err = orthorank("estimate", str(tmp_path / "list.json"))
        assert code == 2
        assert "it is no JSON object with a name as its model_type" in err


def test_a_wrong_option_ends_the_process_with_2_and_one_sentence():
    done = run("demo", "--sparsity", "1.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "orthorank: sparsity is 1.5; it must be above 0 and below 1, such as 0.1\n"


def test_a_doctor_in_a_process_says_no_with_exit_code_1(tiny_folder):
    done = run("doctor", str(tiny_folder), OMP_NUM_THREADS="1")
    assert done.returncode == 1, done.stderr
    assert "does not apply" in done.stdout
    assert "No sink: the largest jump" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["demo", "--frobnicate"], "No such option: --frobnicate"),
        (["demo", "--windows", "two"], "Invalid value for '--windows'"),
        (["demo", "--windows", "0"], "windows is 0; it must be an integer, 1 or more"),
        (["demo", "--window", "4"], "window is 4; it must be an integer, 16 or more"),
        (["demo", "--sparsity", "0"], "sparsity is 0; it must be above 0"),
        (["demo", "--sparsity", "nan"], "sparsity is 'nan'; it must be a number"),
        (["demo", "--sparsity", "a fifth"], "sparsity is 'a fifth'; it must be a number such as 0.25, 1/3 or 25%"),
        (["demo", "--keep-ratio", "1/0"], "keep_ratio is '1/0'; it must be a number"),
        (["demo", "--keep-ratio", "1"], "keep_ratio is 1; it must be above 0 and below 1"),
        (["demo", "--keep-ratio", "-0.1"], "keep_ratio is -0.1; it must be above 0"),
        (["demo", "--layers", "12-x"], "layers is '12-x'; it must be layer numbers such as 12,14 or 12-16,20"),
        (["demo", "--layers", "9-4"], "layers is empty"),
        (["demo", "--layers", "3", "--plan", "default"], "both layers and plan (default)"),
        (["demo", "--layers", "3", "--sparsity", "0.1"], "sparsity is for a search"),
        (["demo", "--plan", "default", "--keep-ratio", "1/2"], "keep_ratio is for a search or for layers"),
        (
            ["demo", "--windows", "1"],
            "windows is 1; maps are fitted on some windows and judged on others: give 2",
        ),
        (["demo", "--rank", "-1"], "rank is -1; it must be an integer, 0 or more"),
        (
            ["demo", "--search", "--plan", "default"],
            "both --search and --plan (default) say where",
        ),
        (["demo", "--search", "--layers", "3"], "both layers and plan (search) say which layers to take"),
        (["demo", "--plan", "no-such-plan"], "plan is 'no-such-plan', and there is no such file or folder"),
        (["demo", "--plan", "pyproject.toml"], "pyproject.toml is not a JSON file"),
        (
            ["demo", "--text", "no-such-file.txt"],
            "text 'no-such-file.txt' cannot be read: No such file or directory; check the path",
        ),
        (["demo", "--model", "./no-such-model"], "model './no-such-model' is no model folder"),
        (["demo", "--device", "cuda:99"], "device is 'cuda:99'"),
        (["demo", "--output", "pyproject.toml"], "output is 'pyproject.toml', which is not a folder"),
        (["doctor", "./no-such-model"], "model './no-such-model' is no model folder"),
        (["doctor", "no-such/model"], "the hub cannot be reached"),
        (["env", "--frobnicate"], "No such option: --frobnicate"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(orthorank, monkeypatch, arguments, sentence):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("orthorank.models._load", no_load_of(sentence))
    code, out, err = orthorank(*arguments)
    assert code == 2
    assert err.startswith("orthorank: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def no_load_of(sentence: str):
    """No model is loaded before the arguments are checked, except where the sentence is about the model's source."""
    from orthorank import models

    def load(*arguments: object) -> None:
        raise AssertionError("a model was loaded before the arguments were checked")

    return models._load if "hub" in sentence else load


def test_an_unwritable_output_folder_is_named_before_the_model_is_loaded(orthorank, monkeypatch, tmp_path):
    monkeypatch.setattr("orthorank.models._load", no_load_of(""))

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("orthorank.common.files.tempfile.NamedTemporaryFile", refuse)  # root may write anywhere
    code, _, err = orthorank("demo", "--output", str(tmp_path / "out"))
    assert code == 2
    assert err == f"orthorank: output folder '{tmp_path}/out' cannot be written to: Permission denied\n"


def test_without_the_harness_tasks_are_refused_before_the_model_is_loaded(orthorank, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "orthorank.evaluation.tasks", raising=False)
    monkeypatch.setattr("orthorank.models._load", lambda *_, **__: pytest.fail("the model is loaded"))
    code, _, err = orthorank("eval", "tasks", "--limit", "2")
    assert code == 2
    assert "evaluating tasks needs lm-evaluation-harness" in err
    assert "run: pip install '.[eval]'" in err


def test_without_typer_the_sentence_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "typer" else object())
    assert cli.main([]) == 2
    assert "pip install '.[demo]' in a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device", "results.json")])
def test_what_the_system_throws_is_a_sentence_too(orthorank, monkeypatch, error):
    def fail() -> None:
        raise error

    monkeypatch.setattr("orthorank.common.environment.environment", fail)
    code, _, err = orthorank("env")
    assert code == 2
    assert err.count("\n") == 1
    assert "interrupted" in err or "results.json: No space left on device" in err


def test_a_bug_is_not_hidden(monkeypatch):
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("orthorank.common.environment.environment", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])


@pytest.mark.parametrize("arguments", [["doctor"], ["demo", "--windows", "2", "--window", "16", "--model"]])
def test_a_tokenizer_with_more_ids_than_the_vocabulary_is_named(orthorank, tiny_folder, tmp_path, arguments):
    from tests.orthorank.models import plain

    folder = shutil.copytree(tiny_folder, tmp_path / "smaller")
    plain("llama", vocab_size=50, num_hidden_layers=6).save_pretrained(folder)
    output = ["--output", str(tmp_path / "out")] if arguments[0] == "demo" else []
    code, _, err = orthorank(*arguments, str(folder), *output)
    assert code == 2
    assert err.startswith("orthorank: the tokenizer gives the id ")
    assert "the vocabulary of the model has 50 entries, 0 to 49: they do not belong together" in err
    assert err.count("\n") == 1


def test_version_is_the_packages(orthorank):
    from orthorank import __version__

    assert orthorank("--version") == (0, f"orthorank-kernels {__version__}\n", "")


def test_env_says_which_backend_every_public_op_takes(orthorank):
    import orthorank_kernels

    code, out, _ = orthorank("env", "--json")
    here = json.loads(out)
    assert code == 0
    assert here["versions"]["torch"]
    cpu = {op["op"]: op for op in here["ops"] if op["device"] == "cpu"}
    assert {"sparse_query_attention", "rms_norm_select", "gather_rows"} <= set(cpu)
    assert set(cpu) <= set(orthorank_kernels.__all__)
    assert {op["backend"] for op in cpu.values()} == {"torch"}
    assert all(op["reason"] for op in cpu.values())
    code, out, _ = orthorank("env")
    assert code == 0
    assert "sparse_query_attention" in out


def test_doctor_as_json_holds_the_report(orthorank, tiny_folder):
    code, out, _ = orthorank("doctor", str(tiny_folder), "--json")
    report = json.loads(out)
    assert code == 1
    assert report["sink"]["applies"] is False
    assert report["candidate_layers"] == []
    assert report["model"]["num_hidden_layers"] == 6


def test_doctor_says_yes_to_smollm2(orthorank, monkeypatch, smollm2):
    from orthorank import models

    info = models._describe(smollm2[0], models.locate(None))
    monkeypatch.setattr(models, "load_model", lambda *arguments: (*smollm2, info))
    code, out, _ = orthorank("doctor")
    assert code == 0
    flat = " ".join(out.split())
    assert "OrthoRank applies" in flat
    assert "The sink forms in layer 11 of 30" in flat
    assert "Layers 12-27 may select tokens (16 of 30)" in flat


@pytest.mark.parametrize(
    "words",
    ["1e400", "1e99999999", "9" * 50, "0x1", "1/0", ""],
    ids=["overflow", "huge", "long", "hex", "zero", "empty"],
)
def test_numbers_that_are_none(words: str) -> None:
    from orthorank.commands import number

    with pytest.raises(OrthoRankError, match=r"sparsity is .*must be a number"):
        number("sparsity", words)


@pytest.mark.parametrize("words", ["0-9999999999", "a", "1,,2", "-"])
def test_layer_numbers_that_are_none(words: str) -> None:
    from orthorank.commands import numbers

    with pytest.raises(OrthoRankError, match=r"layers is .*must be layer numbers"):
        numbers("layers", words)


def test_no_such_home() -> None:
    from orthorank.common.files import writable_folder
    from orthorank.common.texts import find_text
    from orthorank.models import locate

    for use in (writable_folder, locate, find_text):
        with pytest.raises(OrthoRankError, match="no such home directory"):
            use("~nosuch-user/x")
