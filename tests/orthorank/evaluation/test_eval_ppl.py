"""``orthorank eval ppl`` and the texts it measures: files as they are, datasets joined as the literature does."""

import hashlib
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

import orthorank
from orthorank.cli import main
from orthorank.common.datasets import evaluation_text, most_windows
from orthorank.common.errors import OrthoRankError
from orthorank.evaluation import windows
from orthorank.evaluation.perplexity import auto_batch_size, perplexity

LINES = [f"line {n} of some text" for n in range(40)]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(LINES))
    return file


def test_the_command(tiny_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orthorank.models import load_model

    plan = orthorank.OrthoRankConfig(layers=[2, 3], keep_ratio=0.5)
    removed = orthorank.OrthoRankConfig(layers=[2], keep_ratio=0)
    files = [str(p.save_pretrained(tmp_path / name)) for name, p in (("a", plan), ("b", removed))]
    options = ["--text", str(text_file), "--window", "64", "--windows", "3", "--device", "cpu"]
    output = tmp_path / "results" / "ppl"
    arguments = ["eval", "ppl", str(tiny_folder), *options, "--plan", files[0], "--plan", files[1]]
    assert main([*arguments, "--output", str(output)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 windows of 64 tokens (192 tokens, 189 predicted)" in shown
    written = json.loads((output / "ppl.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["dense", "orthorank", "layer pruning"]
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    losses = []
    for row, each in zip(written["rows"], (None, plan, removed), strict=True):
        handle = None if each is None else orthorank.apply(model, each)
        wanted = perplexity(model, text=text_file.read_text(), tokenizer=tokenizer, window=64, windows=3)
        assert row["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)
        assert row["text_sha256"] == wanted.text_sha256
        losses.append(wanted.window_losses)
        if handle is not None:
            handle.remove()
    assert "rise" not in written["rows"][0]
    for row, own in zip(written["rows"][1:], losses[1:], strict=True):
        differences = [b - a for a, b in zip(losses[0], own, strict=True)]
        assert row["rise"]["mean"] == pytest.approx(statistics.fmean(differences), abs=1e-5)
        assert row["rise"]["standard_error"] == pytest.approx(statistics.stdev(differences) / 3**0.5, abs=1e-5)
        assert f"{row['rise']['mean']:.4f} ± {row['rise']['standard_error']:.4f}" in shown
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["plan"]["layers"] == [2, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bos", "twice"], "bos is 'twice'"),
        (["--text", "a.txt", "--dataset", "c4"], "both text and dataset are given"),
        (["--dataset", "imdb"], "dataset is 'imdb'"),
        (["--plan", "nowhere"], "no plan can be read"),
        (["--output", __file__], "which is not a folder"),
        (["--window", "1"], "window is 1"),
        (["--window", "0", "--dataset", "c4:nowhere"], "window is 0"),
    ],
)
def test_the_command_says_what_is_wrong(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["eval", "ppl", str(tiny_folder), "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    """Line ends are the file's own, and the hash that is printed is the file's."""
    content = "one\r\ntwo\rthree\0 ü 日本語\n".encode()
    (tmp_path / "text.txt").write_bytes(content)
    text = evaluation_text(tmp_path / "text.txt")
    assert text.content.encode() == content
    assert text.sha256 == hashlib.sha256(content).hexdigest()


def test_an_interrupted_measurement_goes_on(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, measured = windows.measure, []

    def interrupted(screen: Any, name: str, *rest: Any) -> dict[str, Any]:
        measured.append(name)
        if measured == ["dense", "orthorank"]:
            raise KeyboardInterrupt
        return real(screen, name, *rest)

    monkeypatch.setattr(windows, "measure", interrupted)
    plan = orthorank.OrthoRankConfig(layers=[2], keep_ratio=0.5).save_pretrained(tmp_path / "plan")
    options = ["--text", str(text_file), "--device", "cpu", "--plan", str(plan), "--output", str(tmp_path / "out")]
    line = ["eval", "ppl", str(tiny_folder), *options]
    assert main([*line, "--window", "64"]) == 2
    assert "ppl-rows.jsonl: the same command goes on there" in capsys.readouterr().err
    assert main([*line, "--window", "64"]) == 0
    assert measured == ["dense", "orthorank", "orthorank"], "what was measured is not measured again"
    assert main([*line, "--window", "32"]) == 0
    assert measured[3:] == ["dense", "orthorank"], "other windows are measured anew"
    assert json.loads((tmp_path / "out" / "ppl.json").read_text())["window"] == 32


def test_another_configuration_or_tokenizer_is_measured_anew(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the same weights; rows of earlier versions, which say neither, are found as before."""
    measured: list[str] = []

    def row(screen: Any, name: str, *_: Any) -> dict[str, Any]:
        measured.append(name)
        about = {"text_sha256": "", "windows": 1, "window": 64, "tokens": 64, "predictions": 63}
        return about | {"perplexity": 1.0, "loss": 0.0, "standard_error": None, "window_losses": [0.0]}

    monkeypatch.setattr(windows, "measure", row)
    folder, out = shutil.copytree(tiny_folder, tmp_path / "model"), tmp_path / "out"
    line = ["eval", "ppl", str(folder), "--text", str(text_file), "--device", "cpu", "--window", "64"]
    line += ["--output", str(out), "--batch-size", "1"]
    for times in (1, 1):
        assert main(line) == 0
        assert len(measured) == times
    for file in (folder / "config.json", folder / "tokenizer.json"):
        told = json.loads(file.read_text())
        if "rms_norm_eps" in told:
            told["rms_norm_eps"] = 0.1
        else:
            letters = told["model"]["vocab"]
            letters["e"], letters["t"] = letters["t"], letters["e"]
        file.write_text(json.dumps(told))
        assert main(line) == 0
        assert len(measured) == 2, file
        measured.pop()
    rows = [json.loads(kept) for kept in (out / "ppl-rows.jsonl").read_text().splitlines()][:1]
    key = {name: value for name, value in json.loads(rows[0]["key"]).items() if name not in ("config", "ids_sha256")}
    (out / "ppl-rows.jsonl").write_text(json.dumps(rows[0] | {"key": json.dumps(key, sort_keys=True)}) + "\n")
    assert main(line) == 0
    assert len(measured) == 1


def test_wikitext_is_all_rows_of_the_test_split_joined_by_a_blank_line(tmp_path: Path) -> None:
    import datasets

    splits = {
        "train": datasets.Dataset.from_dict({"text": ["other"]}),
        "test": datasets.Dataset.from_dict({"text": LINES}),
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "copy"))
    text = evaluation_text(dataset=f"wikitext2:{tmp_path / 'copy'}")
    assert text.content == "\n\n".join(LINES)
    assert text.name == f"wikitext2 from the local copy {tmp_path / 'copy'}, first 40 rows", "its owner knows the rest"


def test_c4_is_its_first_1100_documents(tmp_path: Path) -> None:
    (tmp_path / "c4.jsonl").write_text("\n".join(json.dumps({"text": f"document {n}"}) for n in range(1200)))
    text = evaluation_text(dataset=f"c4:{tmp_path}")
    assert text.content == " ".join(f"document {n}" for n in range(1100))
    assert most_windows("c4") == 256


def test_a_copy_without_the_split_is_refused(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": LINES})}).save_to_disk(str(tmp_path / "copy"))
    with pytest.raises(OrthoRankError, match="has the splits train and test is wanted"):
        evaluation_text(dataset=f"wikitext2:{tmp_path / 'copy'}")


def test_one_window_at_a_time_on_a_cpu(tiny_model: Any) -> None:
    assert auto_batch_size(tiny_model("llama"), 128) == 1


@pytest.mark.slow
def test_wikitext_2_of_smollm2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The canonical file of WikiText-2's test split, as a file, first four windows of 1,024."""
    file = Path(__file__).parents[3].parent / "shared" / "data" / "wikitext2" / "wiki.test.raw"
    if not file.is_file():
        pytest.skip(f"the text is not here: {file}")
    options = ["--text", str(file), "--window", "1024", "--windows", "4", "--device", "cpu", "--json"]
    assert main(["eval", "ppl", *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert math.isclose(row["perplexity"], 23.24, abs_tol=0.005)
    assert row["tokens"] == 4096
