"""``orthorank correct``: from a plan and texts to a corrected plan in a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, apply, distill_correction, fit_correction, load_model
from orthorank.cli import main
from orthorank.common.texts import find_text, take_samples, tokenize
from orthorank.evaluation import perplexity
from tests.orthorank.commands.test_bos import byte_tokenizer
from tests.orthorank.models import tiny

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=0.4, keep_ratios={2: 0.0})
SMALL = ("--windows", "10", "--window", "32", "--rank", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a plan and two texts."""
    here = tmp_path_factory.mktemp("correct")
    tiny("llama-2", vocab_size=260).save_pretrained(here)
    byte_tokenizer(False, here)
    PLAN.save_pretrained(here / "plan")
    (here / "boats.txt").write_text("".join(f"Boat {n} left at {n % 24} o'clock. " for n in range(100)))
    (here / "code.txt").write_text("".join(f"def f{n}(x):\n    return x + {n * 7 % 31}\n" for n in range(100)))
    return here


def run(capsys: pytest.CaptureFixture[str], *command: Any) -> str:
    assert main(["correct", *map(str, command)]) == 0, capsys.readouterr().err
    return " ".join(capsys.readouterr().out.split())


def test_it_is_what_the_function_fits(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [folder / "boats.txt", folder / "code.txt"]
    said = run(
        capsys, folder / "plan", folder, *SMALL, "--text", texts[0], "--text", texts[1], "--output", tmp_path / "new"
    )
    found = OrthoRankConfig.from_pretrained(tmp_path / "new")
    model, tokenizer, _ = load_model(str(folder), device="cpu")
    samples = []
    for text in texts:
        tokens = tokenize(find_text(text), tokenizer)
        samples.append(take_samples(tokens, windows=5, window=32, held_out_windows=5, held_out_len=32))
    windows = torch.cat([each.calibration for each in samples])
    expected = fit_correction(model, windows, PLAN, rank=8)
    assert found.correction == expected.correction
    assert f"orthorank eval ppl {folder} --plan {tmp_path / 'new'}" in said
    record = found.calibration["correction"]
    assert [each["windows"] for each in record["texts"]] == [5, 5]
    assert [Path(each["text"]).name for each in record["texts"]] == ["boats.txt", "code.txt"]
    assert record["explained"] == expected.calibration["correction"]["explained"]
    with apply(model, found):
        losses = [perplexity(model, each.held_out).loss for each in samples]
    assert [each["corrected"] for each in found.measured["held_out"]] == pytest.approx(losses, abs=1e-4)
    for share in record["explained"].values():
        assert f"{share:.1%}" in said
    for each in found.measured["held_out"]:
        assert f"{each['dense']:.4f} {each['plan']:.4f} {each['corrected']:.4f}" in said
    assert "One kind of text" not in said


def test_one_kind_of_text_is_warned_of(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(
        capsys,
        folder / "plan",
        folder,
        *SMALL,
        "--text",
        folder / "code.txt",
        "--target",
        "layer",
        "--output",
        tmp_path,
    )
    assert "One kind of text: maps fit the text they learn from." in said
    assert OrthoRankConfig.from_pretrained(tmp_path).calibration["correction"]["target"] == "layer"


def test_a_dataset_beside_a_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"Row {n} of many." for n in range(300)]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "copy")
    options = ("--text", folder / "code.txt", "--dataset", f"wikitext2:{tmp_path / 'copy'}")
    run(capsys, folder / "plan", folder, *SMALL, *options, "--output", tmp_path / "new")
    texts = OrthoRankConfig.from_pretrained(tmp_path / "new").calibration["correction"]["texts"]
    assert "rows 0 to 127" in texts[1]["text"]
    assert "rows 128 to 255" in texts[1]["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "next"), "target is 'next'; it may be dense or layer"),
        (("--rank", "0"), "rank is 0"),
        (("--distill", "-1"), "distill is -1"),
        (("--rank", "65"), "rank is 65; it must be an integer from 1 to 64"),
        (("--windows", "1"), "--windows is 1, for 1 texts"),
        (("--shares", "1,2"), "--shares is '1,2', 2 numbers for 1 texts"),
        (("--shares", "0"), "--shares is '0'; it must be numbers above 0"),
        (("--shares", "a"), "--shares is 'a'; it must be numbers above 0"),
        (("--device-map", "auto"), "give one of them"),
        (("--window", "9999"), "the model's longest input has 512 tokens"),
    ],
)
def test_what_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    given = ["correct", str(folder / "plan"), str(folder), *SMALL, "--text", str(folder / "code.txt"), *options]
    assert main([*given, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_a_plan_that_is_not_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["correct", str(tmp_path / "no"), str(folder), *SMALL]) == 2
    assert "no plan can be read" in capsys.readouterr().err


def test_shares_of_texts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ("--text", folder / "boats.txt", "--text", folder / "code.txt")
    run(capsys, folder / "plan", folder, *SMALL, *texts, "--shares", "4,1", "--output", tmp_path)
    found = OrthoRankConfig.from_pretrained(tmp_path)
    assert [each["windows"] for each in found.calibration["correction"]["texts"]] == [8, 2]


def test_an_interrupted_fit_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was fitted when the process was killed is in the folder; without --resume nothing is touched."""
    from orthorank.calibration.progress import FitProgress

    command = (folder / "plan", folder, *SMALL, "--text", folder / "code.txt", "--spill", tmp_path / "spill")
    run(capsys, *command, "--output", tmp_path / "whole")

    def killed(progress: FitProgress, *given: Any) -> None:
        add(progress, *given)
        raise KeyboardInterrupt

    add = FitProgress.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitProgress, "add", killed)
        assert main(["correct", *map(str, command), "--output", str(tmp_path / "out")]) != 0
    state = tmp_path / "out" / "correct-state.safetensors"
    before = state.read_bytes()
    capsys.readouterr()
    assert main(["correct", *map(str, command), "--output", str(tmp_path / "out")]) == 2
    assert "has an unfinished fit (correct-state.safetensors); go on with it by adding --resume" in " ".join(
        capsys.readouterr().err.split()
    )
    assert state.read_bytes() == before
    run(capsys, *command, "--output", tmp_path / "out", "--resume")
    whole, again = (OrthoRankConfig.from_pretrained(tmp_path / name) for name in ("whole", "out"))
    assert whole == again
    assert not state.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orthorank.calibration.corrections.fit_correction", None)
        assert "This fit is finished: " in run(capsys, *command, "--output", tmp_path / "out", "--resume")
        for others in (("--text", folder / "boats.txt"), ("--rank", 4), ("--distill", 3)):
            given = [*map(str, (*command, *others)), "--output", str(tmp_path / "out"), "--resume"]
            assert main(["correct", *given]) == 2
            assert "has an earlier result (orthorank.json, correction.safetensors)" in capsys.readouterr().err
        other = OrthoRankConfig(layers=[1, 3], keep_ratio=0.5).save_pretrained(tmp_path / "other")
        assert main(["correct", str(other), *map(str, command[1:]), "--output", str(tmp_path / "out"), "--resume"]) == 2
    assert OrthoRankConfig.from_pretrained(tmp_path / "out") == whole
    assert not list((tmp_path / "spill").iterdir())


@pytest.mark.parametrize("command", [["correct", "PLAN"], ["calibrate", "--plan", "PLAN"], ["demo", "--plan", "PLAN"]])
def test_what_search_and_fits_wrote_is_not_replaced(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by a fit with --resume, which has only a state to go on with."""
    monkeypatch.setattr("orthorank.demo.job.load_model", None)  # first: a module imported now keeps what it finds
    monkeypatch.setattr("orthorank.models.load_model", None)
    plan = str(OrthoRankConfig(layers=[1]).save_pretrained(tmp_path / "plan"))
    named = [plan if word == "PLAN" else word for word in command]
    for name in ("orthorank.json", "correction.safetensors", "search.json", "search-state.json"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("{}")
        for more in ([], ["--resume"]) if command[0] == "correct" else ([],):
            assert main([*named, "--output", str(out), *more]) == 2
            said = " ".join(capsys.readouterr().err.split())
            assert f"has an earlier result ({name}), which is not overwritten; name another folder" in said
        assert [(file.name, file.read_text()) for file in out.iterdir()] == [(name, "{}")]


def test_thresholds_are_refused_before_the_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = OrthoRankConfig(layers=[1], keep_ratio=0.4, select="threshold", thresholds={1: 0.5})
    plan.save_pretrained(tmp_path / "thresholds")
    monkeypatch.setattr("orthorank.calibration.corrections.fit_correction", None)
    given = ["correct", str(tmp_path / "thresholds"), str(folder), *SMALL, "--distill", "3"]
    assert main([*given, "--text", str(folder / "code.txt"), "--output", str(tmp_path / "out")]) == 2
    assert "the plan selects by thresholds" in capsys.readouterr().err


def test_maps_are_distilled(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also when the process is killed in between; the fit is not made again."""
    from orthorank.calibration.progress import DistillProgress

    command = (folder / "plan", folder, *SMALL, "--text", folder / "code.txt", "--distill", 9)
    said = run(capsys, *command, "--output", tmp_path / "whole")
    whole = OrthoRankConfig.from_pretrained(tmp_path / "whole")
    first, last = whole.calibration["correction"]["distilled"]["kl"]
    assert f"KL from the dense model: {first:.3f} nats a token in the first steps, {last:.3f} in the last" in said
    model, tokenizer, _ = load_model(str(folder), device="cpu")
    sample = take_samples(
        tokenize(find_text(folder / "code.txt"), tokenizer),
        windows=10,
        window=32,
        held_out_windows=10,
        held_out_len=32,
    )
    fitted = fit_correction(model, sample.calibration, PLAN, rank=8)
    assert whole.correction == distill_correction(model, sample.calibration, fitted, steps=9).correction
    assert whole.correction != fitted.correction

    def killed(progress: DistillProgress, *given: Any) -> None:
        save(progress, *given)
        raise KeyboardInterrupt

    save = DistillProgress.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillProgress, "save", killed)
        assert main(["correct", *map(str, command), "--output", str(tmp_path / "out")]) != 0
    states = [tmp_path / "out" / f"{name}-state.safetensors" for name in ("correct", "distill")]
    assert all(state.exists() for state in states)
    capsys.readouterr()
    assert main(["correct", *map(str, command), "--output", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has an unfinished fit (correct-state.safetensors, distill-state.safetensors)" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orthorank.calibration.fitting.fit_map", None)
        run(capsys, *command, "--output", tmp_path / "out", "--resume")
    assert OrthoRankConfig.from_pretrained(tmp_path / "out") == whole
    assert not any(state.exists() for state in states)
