"""The reproduction of the paper on a tiny model: every part, resuming, verdicts, and what is written."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig
from orthorank.cli import main
from orthorank.reproduce import paper, tables
from orthorank.reproduce.cells import Cells
from orthorank.reproduce.claims import check_claims
from orthorank.reproduce.run import reproduce
from orthorank.reproduce.settings import PARTS, ReproduceSettings
from orthorank.reproduce.subject import plan_key


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and LongBench questions."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("calibration", "one", "two"):
        (folder / f"{name}.txt").write_text("\n".join(f"{name}: line {n}, some words" for n in range(120)))
    rows = [{"task": "lcc", "idx": n, "prompt": f"x = {n}", "gold": ["y"]} for n in range(2)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def settings_for(model: Path, inputs: Path, output: Path, **fields: Any) -> ReproduceSettings:
    small: dict[str, Any] = {
        "model": str(model),
        "output": output,
        "calibration": str(inputs / "calibration.txt"),
        "texts": {"one": str(inputs / "one.txt"), "two": str(inputs / "two.txt")},
        "calibration_windows": 2,
        "calibration_window": 32,
        "windows": 3,
        "window": 64,
        "tasks": (),
        "longbench": str(inputs / "questions.jsonl"),
        "prompt_tokens": 24,
        "rounds": 1,
        "device": "cpu",
    }
    return ReproduceSettings(**(small | fields))


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("reproduction")
    return output, reproduce(settings_for(tiny_folder, inputs, output))


def test_every_part_is_there(finished: tuple[Path, dict[str, Any]]) -> None:
    output, summary = finished
    written = json.loads((output / "summary.json").read_text())
    assert written["table1"] == json.loads(json.dumps(summary["table1"]))
    for part in PARTS:
        key = {"fig2": "similarities", "fig3": "similarities", "fig6": "similarities", "fig7": "similarities"}.get(
            part, "layerwise" if part == "fig4" else part
        )
        assert key in summary, part
    rows = {row["row"]: row for row in summary["table1"]["rows"]}
    assert set(rows) == {"dense", "sleb-20", "sleb-20+orthorank"}, "the tiny model has one layer to choose"
    assert set(rows["dense"]["perplexity"]) == {"one", "two"}
    assert rows["dense"]["paper_perplexity"]["Llama-2-7B"] == 7.26
    assert rows["sleb-20"]["throughput"]["flop_speedup"] > 1
    assert {row["row"] for row in summary["table3"]["rows"]} == set(paper.ABLATION)
    assert summary["longbench"]["questions"] == 2
    pictures = {path.stem[:4] for path in output.glob("*.png")}
    assert pictures == {"fig2", "fig3", "fig4", "fig5", "fig7"}
    text = (output / "tables.md").read_text()
    assert all(title in text for title in ("Table 1", "Table 3", "Claims", "7.26 / 6.73"))


def test_the_committed_figures_are_found_by_the_fields_of_today() -> None:
    """A field that plans have got since is in no key where it says nothing."""
    cells = sorted((Path(__file__).parents[3] / "benchmarks/results/reproduce").glob("*/cells/perplexity/*.json"))
    plans = [plan for cell in cells if (plan := json.loads(cell.read_text())["inputs"]["plan"]) is not None]
    if not plans:
        pytest.skip("the cells of the reproduction are in a checkout, not in the source archive")
    for plan in plans:
        assert plan_key(OrthoRankConfig.from_dict(plan)) == plan


def test_perplexities_are_those_of_the_plans(
    finished: tuple[Path, dict[str, Any]], tiny_folder: Path, inputs: Path
) -> None:
    import orthorank
    from orthorank.evaluation.perplexity import perplexity
    from orthorank.models import load_model

    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    for row in finished[1]["table3"]["rows"]:
        plan = orthorank.OrthoRankConfig(**row["plan"])
        with orthorank.apply(model, plan):
            wanted = perplexity(model, text=(inputs / "one.txt").read_text(), tokenizer=tokenizer, window=64, windows=3)
        assert row["perplexity"]["one"]["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)


@pytest.mark.parametrize("windows", [1, 2])
def test_corrected_rows(tiny_folder: Path, inputs: Path, tmp_path: Path, windows: int) -> None:
    """Each plan with maps fitted to the calibration windows, beside itself without them."""
    import orthorank
    from orthorank.evaluation.perplexity import perplexity
    from orthorank.models import load_model

    asked = settings_for(
        tiny_folder, inputs, tmp_path, only=("corrected",), calibration_windows=windows, calibration_window=33
    )
    rows = reproduce(asked)["corrected"]["rows"]
    assert [row["row"] for row in rows] == ["sleb-20", "sleb-20+orthorank"]
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    ids = torch.tensor(tokenizer((inputs / "calibration.txt").read_text())["input_ids"])[: windows * 33]
    fit_ids = ids.view(2, 33) if windows == 2 else ids[:32].view(2, 16)
    for row in rows:
        plan = orthorank.OrthoRankConfig(**row["plan"])
        found = {}
        for name, each in (
            ("plain_perplexity", plan),
            ("perplexity", orthorank.fit_correction(model, fit_ids, plan, rank=row["rank"])),
        ):
            with orthorank.apply(model, each):
                text = (inputs / "one.txt").read_text()
                found[name] = perplexity(model, text=text, tokenizer=tokenizer, window=64, windows=3).perplexity
            assert row[name]["one"]["perplexity"] == pytest.approx(found[name], rel=1e-5)
        assert row["flop_speedup"] > 1
    text = (tmp_path / "tables.md").read_text()
    assert "Beyond the paper: corrected plans" in text
    assert f"{found['perplexity']:.2f} ({found['plain_perplexity']:.2f})" in text


def test_a_second_run_computes_nothing(
    finished: tuple[Path, dict[str, Any]], tiny_folder: Path, inputs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(finished[0], copied)
    computed: list[str] = []
    real = Cells.get

    def watched(self: Cells, name: str, inputs: dict[str, Any], compute: Any, **more: Any) -> Any:
        def noted() -> Any:
            computed.append(name)
            return compute()

        return real(self, name, inputs, noted, **more)

    monkeypatch.setattr(Cells, "get", watched)
    again = reproduce(settings_for(tiny_folder, inputs, copied))
    assert computed == []
    assert again["claims"] == json.loads((finished[0] / "summary.json").read_text())["claims"]
    lost = next((copied / "cells" / "perplexity").glob("one-*.json"))
    lost.unlink()
    reproduce(settings_for(tiny_folder, inputs, copied))
    assert computed == [f"perplexity/{lost.stem}"]


def test_the_sweep_continues_the_search(tiny_folder: Path, inputs: Path, tmp_path: Path) -> None:
    """Its points are prefixes of one greedy run, whether that run was begun for fewer layers or not."""
    short = settings_for(tiny_folder, inputs, tmp_path / "a", only=("sweep",), sweep=(0.2,))
    reproduce(short)
    longer = settings_for(tiny_folder, inputs, tmp_path / "a", only=("sweep",), sweep=(0.2, 0.4, 0.5))
    points = reproduce(longer)["sweep"]["points"]
    at_once = reproduce(settings_for(tiny_folder, inputs, tmp_path / "b", only=("sweep",), sweep=(0.2, 0.4, 0.5)))
    assert points == at_once["sweep"]["points"]
    by_method: dict[str, list[list[int]]] = {}
    for point in points:
        by_method.setdefault(point["method"], []).append(point["layers"])
    for plans in by_method.values():
        assert all(set(few) <= set(more) for few, more in itertools.pairwise(plans))
    assert [len(layers) for layers in by_method["sleb"]] == [1, 2, 3]


def test_another_text_has_figures_of_its_own(tiny_folder: Path, inputs: Path, tmp_path: Path) -> None:
    found = [
        reproduce(
            settings_for(
                tiny_folder, inputs, tmp_path, only=("fig2", "fig4"), texts={"it": str(inputs / f"{name}.txt")}
            )
        )
        for name in ("one", "two", "one")
    ]
    for part in ("similarities", "layerwise"):
        assert found[0][part] != found[1][part]
        assert found[0][part] == found[2][part]


def test_parts_that_run_one_by_one_are_one_summary(
    finished: tuple[Path, dict[str, Any]], tiny_folder: Path, inputs: Path, tmp_path: Path
) -> None:
    """A run of some parts keeps the others' figures and verdicts, if they were made with the same settings."""
    copied = tmp_path / "copy"
    shutil.copytree(finished[0], copied)
    before = json.loads((copied / "summary.json").read_text())
    reproduce(settings_for(tiny_folder, inputs, copied, only=("table4",)))
    after = json.loads((copied / "summary.json").read_text())
    assert after == before
    assert "Table 1" in (copied / "tables.md").read_text()
    summary = reproduce(settings_for(tiny_folder, inputs, copied, only=("table4",), windows=2))
    assert "table1" not in summary, "other sizes: its figures do not stand beside those"
    for content in ("{", "[]"):
        (copied / "summary.json").write_text(content)
        assert "table4" in reproduce(settings_for(tiny_folder, inputs, copied, only=("table4",)))


def test_longbench_without_a_short_prompt_is_left_out(tiny_folder: Path, inputs: Path, tmp_path: Path) -> None:
    summary = reproduce(settings_for(tiny_folder, inputs, tmp_path, only=("longbench",), longbench_tokens=1))
    assert "longbench" not in summary
    assert (tmp_path / "tables.md").is_file()


def test_sizes_that_differ_are_said(finished: tuple[Path, dict[str, Any]]) -> None:
    """One of six layers removed, and one of six at a third: not the same share of updates, and the claim says so."""
    rows = {row["row"]: row for row in finished[1]["table1"]["rows"]}
    assert rows["sleb-20"]["nominal_sparsity"] == pytest.approx(1 / 6)
    assert rows["sleb-20+orthorank"]["nominal_sparsity"] == pytest.approx(
        len(rows["sleb-20+orthorank"]["plan"]["layers"]) / 9
    )
    (claim, *_) = [one for one in check_claims(finished[1]) if "SLEB + OrthoRank" in one.claim]
    assert "of the updates left out against 16.7 %" in claim.detail
    assert claim.unit == "nats per token"
    text = (finished[0] / "tables.md").read_text()
    threads = torch.get_num_threads()
    assert f" with {threads} thread{'s' if threads > 1 else ''}, by wall clock" in text
    assert "lcc (2)" in text
    assert str(finished[0].parent) not in text, "no path of this machine"


def test_claims_of_the_finished_parts_alone(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    claims = check_claims(summary)
    words = [claim.claim for claim in claims]
    assert sum("SLEB + OrthoRank" in one for one in words) == 2, "20 %, on two texts"
    assert sum("random" in one for one in words) == 4
    assert {claim.verdict for claim in claims} <= {"holds", "fails", "undecided"}
    assert check_claims({"table1": summary["table1"]}) != []
    assert check_claims({}) == []


def test_the_command(tiny_folder: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calibration", str(inputs / "calibration.txt"), "--text", f"one={inputs / 'one.txt'}"]
    sizes = ["--calibration-window", "32", "--window", "64", "--device", "cpu", "--tasks", "none", "--quick"]
    out = tmp_path / "out"
    assert main(["reproduce", str(tiny_folder), *options, *sizes, "--only", "sweep,fig5", "--output", str(out)]) == 0
    assert "Perplexity over sparsity" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["settings"]["windows"] == 2


def test_an_interrupted_command_says_what_is_kept(
    tiny_folder: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "table4", interrupted)
    options = ["--calibration", str(inputs / "calibration.txt"), "--text", f"one={inputs / 'one.txt'}"]
    sizes = ["--calibration-window", "32", "--window", "64", "--device", "cpu", "--tasks", "none", "--quick"]
    out = tmp_path / "out"
    assert main(["reproduce", str(tiny_folder), *options, *sizes, "--only", "fig5,table4", "--output", str(out)]) == 2
    assert f"finished cells are in {out}: the same command goes on there" in capsys.readouterr().err
    assert "fig5" in json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "table9"], "only holds 'table9'"),
        (["--text", "=x"], "text is '=x'"),
        (["--text", "a=x", "--text", "a=y"], "text is 'a=y'"),
        (["--quick", "--full"], "both --quick and --full"),
        (["--text", "a=nowhere.txt"], "nowhere.txt' cannot be read"),
        (["--windows", "0"], "windows is 0"),
    ],
)
def test_the_command_says_what_is_wrong(
    tiny_folder: Path,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    common = ["--calibration", str(inputs / "calibration.txt"), "--device", "cpu", "--output", str(tmp_path / "o")]
    given = options if "--text" in options else [*options, "--text", f"one={inputs / 'one.txt'}"]
    assert main(["reproduce", str(tiny_folder), *common, *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
