"""Tables of made-up GPU results: the campaign's own, and those that README and pages get from committed ones."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import keep_gpu_results, readme_gpu
from benchmarks.campaign import summary, tables

COMMON = {
    "campaign": "A", "gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0",
    "numpy": "2.5.2", "python": "3.12.3", "commit": "abc", "date": "2030-01-02", "dry": False,
}  # fmt: skip
SHAPE = "1 x 8192, 32/8 heads of 128"


def time(step: str, provider: str, rate: float, mode: str = "replay", **more: Any) -> dict[str, Any]:
    line = {
        "step": step, "kind": "time", "op": "sparse_query_attention", "shape": SHAPE, "provider": provider,
        "mode": mode, "median_us": 1000.0 / rate, "spread": 0.011, "n": 31, "rate": rate, "share": 0.5,
        "unit": "TFLOP/s",
    }  # fmt: skip
    return COMMON | line | more


def forward(variant: str, number: int, seconds: float, ideal: float = 1.0) -> dict[str, Any]:
    line = {
        "step": "prefill", "kind": "forward", "model": "Llama-3-8B", "shape": "1 x 8192", "variant": variant,
        "round": number, "seconds": seconds, "tokens": 8192, "ideal": ideal, "peak_gb": 20.0 + number,
    }  # fmt: skip
    return COMMON | line


LINES = [
    COMMON | {"step": "about", "kind": "fact", "what": "driver", "value": "570 | 1980 MHz"},
    COMMON | {"step": "about", "kind": "ceiling", "what": "copy", "rate": 2900.0, "unit": "GB/s"},
    COMMON | {"step": "smoke", "kind": "check", "what": "gather_rows", "status": "ok"},
    COMMON | {"step": "smoke", "child": "TMA descriptors", "status": "switched off", "note": "ORTHORANK_TMA=0"},
    time("attention", "orthorank_kernels, pointers", 400.0),
    time("attention", "SDPA cuDNN, all tokens", 500.0),
    time("attention", "SDPA flash, all tokens", 320.0, mode="eager", host_us=12.0),
    time("attention", "SDPA flash, all tokens", 320.0),
    time("rows", "orthorank_kernels", 2000.0, op="gather_rows", unit="GB/s", shape="1 x 2"),
    COMMON | {"step": "attention", "op": "sparse_query_attention", "status": "failed", "note": "out of memory " * 40},
    forward("dense", 0, 0.2),
    forward("orthorank 20 %", 0, 0.16, 1.22),
    forward("orthorank 20 %", 1, 0.15, 1.22),
    forward("dense", 1, 0.3),
    forward("orthorank 20 %", 2, 0.17, 1.22),
    COMMON | {"step": "parity", "kind": "test", "test": "a", "status": "passed"},
    COMMON | {"step": "parity", "kind": "test", "test": "b", "status": "failed", "note": "off by 1"},
    COMMON | {"step": "parity", "kind": "test", "test": "all", "status": "failed", "note": "2 selected"},
]


def results(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "table.md").write_text(tables.markdown(LINES))
    return folder


def test_a_speed_up_is_the_median_of_the_ratios_within_a_round():
    dense, plan = summary.forwards(LINES)
    assert dense["speedup"] == 1.0
    assert plan["speedup"] == pytest.approx((0.2 / 0.16 + 0.3 / 0.15) / 2)  # the third round has no dense forward
    assert plan["seconds"] == 0.16
    assert plan["tokens_per_second"] == pytest.approx(8192 / 0.16)
    assert (plan["rounds"], plan["forwards"], plan["peak_gb"], plan["ideal"]) == (3, 3, 22.0, 1.22)
    assert summary.forwards([forward("plan", 0, 1.0)])[0]["speedup"] is None


def test_attention_stands_beside_its_peers_and_what_was_expected():
    cudnn, flash = summary.ratios(LINES)
    assert (cudnn["rate"], cudnn["model"], cudnn["target"]) == (0.8, 0.68, 0.95)
    assert (flash["rate"], flash["model"]) == (1.25, 1.15)
    [unknown] = summary.ratios([time("attention", "orthorank_kernels, x", 1.0), time("attention", "another", 2.0)])
    assert (unknown["rate"], unknown["model"]) == (0.5, None)


def test_of_the_same_measurement_made_twice_the_later_one_counts():
    twice = [time("attention", "a", 1.0), time("attention", "a", 2.0)]
    assert [line["rate"] for line in summary.times(twice)] == [2.0]
    assert summary.spread([0.0, 0.0, 0.0]) == 0.0


def test_the_table_has_everything():
    text = tables.markdown(LINES)
    for part in (
        "NVIDIA H100 80GB HBM3", "triton 3.6.0", "570 \\| 1980 MHz", "2,900 GB/s", "| 0.80 |", "0.68",
        "expected (estimate)", "1.625x", "1.220x", "1 failed, 1 passed", "switched off", "off by 1", "out of memory",
        "| gather_rows | 1 x 2 |",
    ):  # fmt: skip
        assert part in text, part
    assert "dry run" not in text
    assert max(map(len, text.splitlines())) < 600
    assert "A dry run" in tables.markdown([LINES[0] | {"dry": True}])
    assert "Nothing was measured" in tables.markdown([])
    assert "orthorank" in tables.markdown([forward("orthorank 20 %", 0, 1.0)])


def test_without_results_no_gpu_figure_is_claimed(tmp_path):
    assert "No GPU figure is claimed" in readme_gpu.section(tmp_path)
    assert "(ptx.md)" in readme_gpu.section(tmp_path, docs="")


def test_committed_results_become_tables(tmp_path, capsys):
    output = results(tmp_path / "out")
    assert keep_gpu_results.main([str(output), "--results", str(tmp_path / "results")]) == 0
    kept = tmp_path / "results" / "nvidia-h100-80gb-hbm3"
    assert {path.name for path in kept.iterdir()} == {"campaign.jsonl", "table.md", "about.json"}
    about = json.loads((kept / "about.json").read_text())
    assert (about["triton"], about["date"]) == ("3.6.0", "2030-01-02")
    text = readme_gpu.section(tmp_path / "results")
    assert "No GPU figure is claimed" not in text
    for part in (
        "one NVIDIA H100 80GB HBM3",
        "Triton 3.6.0",
        "1.625x",
        f"| {SHAPE} | 400 | 500 | 320 |  |",
        "1 failed",
    ):
        assert part in text, part
    assert "nvidia-h100-80gb-hbm3/campaign.jsonl" in text


def test_the_readme_takes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(readme_gpu.__file__).parent), *sys.path])
    import readme

    keep_gpu_results.main([str(results(tmp_path / "out")), "--results", str(tmp_path)])
    for page in ("README.md", "docs/limits.md"):
        before = (readme.ROOT / page).read_text()
        monkeypatch.setitem(readme.PAGES, page, {"gpu": readme.PAGES[page]["gpu"]})
        with monkeypatch.context() as patched:
            patched.setattr(readme, "RESULTS", tmp_path)
            after = readme.rewritten(page, before)
        assert "1.625x" in after
        assert "No GPU figure is claimed" not in after
        patched_none = readme.rewritten(page, after)
        assert patched_none == before or list(readme.RESULTS.glob("*/campaign.jsonl"))


def test_gpus_without_prefill_or_tests_have_what_there_is(tmp_path):
    folder = tmp_path / "a-gpu"
    folder.mkdir()
    (folder / "campaign.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    text = readme_gpu.section(tmp_path)
    assert "NVIDIA H100" in text
    assert "| --- |" not in text


@pytest.mark.parametrize(
    ("line", "said"), [({"gpu": "unknown"}, "no results of a GPU"), ({"gpu": "none", "dry": True}, "dry run")]
)
def test_what_is_no_result_of_a_gpu_is_refused(tmp_path, capsys, line, said):
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    assert keep_gpu_results.main([str(tmp_path), "--results", str(tmp_path / "results")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
