"""The microbenchmarks check before they time: what is right passes, what is wrong has no number."""

import json
import subprocess
import sys
import types

import pytest
import torch
from torch.nn import functional

from benchmarks import on_gpu
from benchmarks.micro import attention, rows, suite, timing, workload
from benchmarks.micro.results import COLUMNS, rows_of, table, write_csv
from benchmarks.static.run import ROOT

CPU = torch.device("cpu")
SIZES = dict.fromkeys(suite.ROWS, (2, 48, 64)) | {attention.sparse_query_attention: (2, 48, 4, 2, 16)}


def corrupted(result):
    """Each tensor of the result moved: by one, or by the size of its values."""
    if not isinstance(result, torch.Tensor):
        return tuple(corrupted(t) for t in result)
    return result + (result.abs().mean() if result.is_floating_point() else 1)


@pytest.mark.parametrize("make", SIZES, ids=lambda make: make.__name__)
def test_the_reference_passes_and_another_result_does_not(make):
    made = make(CPU, *SIZES[make])
    result = made.providers["torch"]()()
    made.check(result)
    with pytest.raises(AssertionError):
        made.check(corrupted(result))
    assert made.amount > 0
    assert make.__doc__.startswith(("Bytes:", "FLOPs:"))


@pytest.mark.parametrize("make", SIZES, ids=lambda make: make.__name__)
def test_kernels_are_left_out_on_a_cpu_and_the_reason_is_said(make):
    with pytest.raises(workload.LeftOut, match="interpreter"):
        make(CPU, *SIZES[make]).providers["triton"]()


def test_peers_of_torch_pass(monkeypatch):
    for make, names in ((rows.gather_rows, ["torch.gather"]), (rows.scatter_rows, ["torch.scatter_"]),
                        (rows.scatter_add_rows, ["add, torch.scatter_"]), (rows.select_tokens, ["torch.topk + sort"]),
                        (attention.sparse_query_attention, ["SDPA math with a mask", "SDPA flash, all tokens"]),
                        ):  # fmt: skip
        made = make(CPU, *SIZES[make])
        for name in names:
            made.check(made.providers[name]()())


def test_peers_that_need_a_gpu_are_called_right(monkeypatch):
    """With stand-ins that compute on a CPU what the peers are documented to compute."""
    monkeypatch.setattr(rows, "needs", lambda *_: None)
    liger = types.SimpleNamespace(rms_norm_forward=lambda x, w, eps, offset, mode, row_mode: (
        functional.rms_norm(x, (x.shape[-1],), w, eps), None))  # fmt: skip
    gems = types.SimpleNamespace(topk=lambda x, k, largest: torch.topk(x, k, largest=largest))
    for name in ("liger_kernel", "liger_kernel.ops", "flag_gems", "flag_gems.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", liger)
    monkeypatch.setitem(sys.modules, "flag_gems.ops.topk", gems)
    for make, name in (
        (rows.rms_norm_score, "Liger-Kernel, no score"),
        (rows.select_tokens, "FlagGems topk + sort"),
    ):
        made = make(CPU, *SIZES[make])
        result = made.providers[name]()()
        made.check(result)
        with pytest.raises(AssertionError):
            made.check(corrupted(result))


def test_every_provider_is_in_the_suite():
    listed = {(b.make, b.provider) for b in suite.benchmarks()}
    for make, size in SIZES.items():
        assert {(make, name) for name in make(CPU, *size).providers} == {p for p in listed if p[0] is make}


@pytest.mark.parametrize("name", ["SDPA cuDNN, all tokens", "SDPA cuDNN with a mask", "SDPA efficient with a mask"])
def test_backends_of_a_gpu_are_left_out_on_a_cpu(name):
    with pytest.raises(workload.LeftOut, match="needs a GPU"):
        attention.sparse_query_attention(CPU, *SIZES[attention.sparse_query_attention]).providers[name]()


def test_one_backend_of_sdpa_runs_and_no_other():
    """The one that is named: it is the only one that is enabled inside."""
    enabled = []

    def look():
        asked = {"flash": "flash_sdp", "math": "math_sdp", "efficient": "mem_efficient_sdp", "cudnn": "cudnn_sdp"}
        enabled.append([name for name, on in asked.items() if getattr(torch.backends.cuda, f"{on}_enabled")()])

    for backend in (*attention.DENSE.values(), *attention.MASKED.values()):
        attention.forced(backend, torch.device("cuda"), look)()
    assert enabled == [["flash"], ["cudnn"], ["cudnn"], ["efficient"], ["math"]]


def test_work_is_that_of_the_queries_that_there_are():
    """All tokens: half of the square and half of the diagonal; a third of them: what their positions see."""
    batch, tokens, heads, kv_heads, head_dim = SIZES[attention.sparse_query_attention]
    made = attention.sparse_query_attention(CPU, batch, tokens, heads, kv_heads, head_dim)
    assert made.amount_of("SDPA flash, all tokens") == 4 * head_dim * heads * batch * sum(range(1, tokens + 1))
    positions = workload.thirds(CPU, batch, tokens)
    assert made.amount == made.amount_of("triton") == 4 * head_dim * heads * int((positions + 1).sum())


def test_inputs_follow_the_seed():
    first, again = (workload.random(CPU, 3) for _ in range(2))
    with workload.seeded(1):
        other = workload.random(CPU, 3)
        assert not torch.equal(workload.thirds(CPU, 1, 30), workload.thirds(CPU, 1, 30) * 0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, workload.random(CPU, 3))


@pytest.mark.parametrize(("once", "rounds"), [(0.01, 50), (0.1, 10), (3.0, 5)])
def test_rounds(once, rounds):
    clock = iter([0.0, once])
    assert timing.rounds_for(lambda: None, lambda: next(clock)) == rounds


def test_rows_and_files(tmp_path):
    entry = {
        "extra_info": {"op": "gather_rows", "shape": "1 x 2", "provider": "triton", "unit": "GB/s", "amount": 2e6},
        "stats": {"median": 1e-3, "iqr": 1e-5, "rounds": 7},
    }
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"benchmarks": [entry]}))
    [row] = rows_of(report, "a-gpu")
    assert (row["rate"], row["median_us"], row["quartile_range_us"]) == (2.0, 1000.0, 10.0)
    write_csv(tmp_path / "ops.csv", [row])
    assert (tmp_path / "ops.csv").read_text().splitlines() == [
        ",".join(COLUMNS), "gather_rows,1 x 2,triton,a-gpu,1000.0,10.0,7,2.0,GB/s",
    ]  # fmt: skip
    assert "triton" in table([row])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("what", ["on_gpu.py tests", "on_gpu.py bench"])
def test_without_a_gpu_the_gpu_commands_refuse(what):
    script, argument = what.split()
    command = [sys.executable, f"benchmarks/{script}", argument]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "this needs a GPU" in run.stderr
    assert "make test" in run.stderr


def test_the_summary_of_a_test_run_names_what_failed(tmp_path):
    report = tmp_path / "tests.jsonl"
    lines = [{"test": name, "status": status} for name, status in (("a", "ok"), ("b", "failed"), ("c", "skipped"))]
    late = {"test": "all", "status": "failed", "note": "4 selected, 1 left out for lack of time"}
    report.write_text("\n".join(map(json.dumps, [*lines, late])) + '\n{"test": "cut o')
    assert on_gpu.summary(report) == {"tests": 3, "ok": 1, "skipped": 1, "failed": ["b"], "late": [late["note"]]}
