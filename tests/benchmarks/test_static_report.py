"""The report on the compiled kernels: what it holds, and which of it is of today's sources."""

import ast
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich")

from benchmarks.static import fingerprint
from benchmarks.static.case import REPORTED_TARGETS, Case, empty, launch, worst_ratio
from benchmarks.static.occupancy import occupancy
from benchmarks.static.run import ROOT, triton_version
from benchmarks.static.store import Store, wanted
from benchmarks.static_report import measure_all


def case(**changes) -> Case:
    x = empty(2, 8, 64, dtype=changes.get("dtype", torch.bfloat16))
    return Case(
        "rows", "gather", launch("rows.gather_rows", x, empty(2, 3, dtype=torch.int32)), changes.get("limits", {})
    )


def test_a_measurement_is_of_its_arguments_target_and_compiler_and_not_of_its_limits():
    key = fingerprint.keys(case(), ["sm_80", "sm_90"], "3.9.0")
    assert key == fingerprint.keys(case(limits={"spills": 0}), ["sm_80", "sm_90"], "3.9.0")
    others = [
        key["sm_90"],
        fingerprint.keys(case(dtype=torch.float32), ["sm_80"], "3.9.0")["sm_80"],
        fingerprint.keys(case(), ["sm_80"], "3.9.1")["sm_80"],
    ]
    assert len({key["sm_80"], *others}) == 4


def test_a_measurement_is_of_the_code_and_not_of_its_notes():
    source = "def f(x):\n    '''About it.'''\n    # why\n\n    return x + 1  # one\n"
    assert fingerprint.stripped(source) == "def f(x):\n    return x + 1"
    assert fingerprint.stripped(source.replace("About", "More about")) == fingerprint.stripped(source)
    assert fingerprint.stripped(source.replace("+ 1", "+ 2")) != fingerprint.stripped(source)
    assert fingerprint.stripped("x = '# no comment'\n") == "x = '# no comment'"


def test_a_launcher_brings_what_it_imports_and_nothing_else():
    rows = {path.name for path in fingerprint.launched_sources("'rows.gather_rows'")}
    assert {"rows.py", "primitives.py"} <= rows
    assert "attention.py" not in rows
    everything = {path.name for path in fingerprint.launched_sources("nothing known")}
    assert {"rows.py", "attention.py", "selection.py", "radix.py"} <= everything


def test_a_changed_default_setting_makes_a_case_stale(monkeypatch):
    assert all(path.exists() for path in fingerprint.SHARED)
    launched = fingerprint.launched_sources("'selection.select_tokens'")
    assert set(fingerprint.SHARED) <= set(launched)
    settings = fingerprint._settings("\n".join(map(fingerprint.code_of, launched)))
    assert "select_tokens.default.json" in settings
    assert "gather_rows" not in settings
    before = fingerprint.keys(case(), ["sm_80"], "3.9.0")
    monkeypatch.setattr(fingerprint, "_settings", lambda code: settings.replace("num_warps", "warps"))
    assert fingerprint.keys(case(), ["sm_80"], "3.9.0") != before


def test_a_store_keeps_what_is_current_and_drops_what_is_no_case(tmp_path):
    path = tmp_path / "static.json"
    want, other = wanted("3.9.0", peers=False)[:2]
    store = Store(path)
    assert store.stale([want, other]) == [want, other]
    for w, key in ((want, want.key), (other, "0" * 16)):
        store.rows[w.place] = {"target": w.target, "group": w.case.group, "case": w.case.name, "key": key}
    store.rows["sm_80", "rows", "gone"] = {"target": "sm_80", "group": "rows", "case": "gone", "key": "0" * 16}
    store.write([want, other], "3.9.0")
    again = Store(path)
    assert list(again.rows) == [want.place, other.place]
    assert again.stale([want, other]) == [other]


def test_what_the_compiler_would_be_asked_for_again_is_not_compiled():
    """The row of the first case stays, though its key is of other sources; that of the second is of another request."""
    if triton_version() != "3.9.0":
        pytest.skip("the committed report has what Triton 3.9.0 is asked for")
    committed = Store(ROOT / "benchmarks" / "results" / "static.json")
    names = {"gather_rows 576 bfloat16", "scatter_rows_ 576 bfloat16"}
    wants = [w for w in wanted("3.9.0", peers=False) if w.target == "sm_80" and w.case.name in names]
    one, two = (w.place for w in wants)
    before = {
        one: {**committed.rows[one], "key": "old", "registers": -1},
        two: {**committed.rows[two], "key": "old", "registers": -1, "asked": "0" * 16},
    }
    now = {}
    measure_all(wants, 1, None, lambda want, row: now.__setitem__(want.place, row), before)
    assert now[one] == {**committed.rows[one], "registers": -1}
    assert now[two] == committed.rows[two]


def test_what_the_compiler_is_asked_for_differs_between_targets():
    rows = Store(ROOT / "benchmarks" / "results" / "static.json").rows.values()
    asked = {
        target: {row["asked"] for row in rows if row["target"] == target and row["group"] != "peers"}
        for target in REPORTED_TARGETS
    }
    assert all(len(of_target) > 30 for of_target in asked.values())
    assert len(set.union(*asked.values())) == sum(map(len, asked.values()))


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "share"),
    [
        ("sm_80", 8, 64, 0, 0.5),
        ("sm_80", 8, 65, 0, 0.375),
        ("sm_90", 8, 32, 114 << 10, 0.125),
        ("sm_90", 8, 216, 100 << 10, 0.125),
        ("sm_80", 4, 16, 0, 1.0),
        ("gfx942", 4, 128, 0, 0.5),
        ("gfx942", 4, 64, 33 << 10, 0.125),
        ("gfx1100", 4, 96, 0, 1.0),
    ],
)
def test_occupancy(target, warps, registers, shared, share):
    assert occupancy(target, warps, registers, shared) == share


@pytest.mark.parametrize(
    ("limits", "ratio"),
    [
        ({"registers": 64}, (0.9375, "registers")),
        ({"registers": 64, "ntm": 800}, (850 / 800, "ntm")),
        ({"min_wide_loads": 0.8}, (0.8 / 0.9, "wide_loads")),
        ({"spills": 0, "min_wide_stores": 1.0}, (0.0, "")),
        ({"atomics": 0}, (float("inf"), "atomics")),
        ({"missing": 5}, (float("inf"), "missing")),
    ],
)
def test_the_tightest_limit(limits, ratio):
    measured = {"registers": 60, "ntm": 850, "wide_loads": 0.9, "wide_stores": 1.0, "spills": 0, "atomics": 1}
    assert worst_ratio(measured, limits, "sm_80") == ratio


def test_check_compiles_a_case_and_prints_the_worst_ratio_last(tmp_path):
    command = [
        sys.executable,
        "benchmarks/static_report.py",
        "--check",
        "--target",
        "sm_80",
        "--only",
        "^gather_rows 576",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert 0 < float(run.stdout.split()[-1]) <= 1
    assert "1 kernels, 0 broken limits" in run.stdout


def test_the_template_of_flex_attention_is_filled_with_the_mask_of_selected_queries():
    from benchmarks.static.flex import options, source

    constants, warps, stages = options(128, 4, "sm_90")
    text = source(constants)
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert {"kernel", "forward_inner", "forward_block_mn"} <= set(functions)
    assert "mask_mod_output = n <= tl.load(arg_POSITIONS + off_z * QLEN_ + m)" in text
    assert f"BLOCK_M: tl.constexpr = {constants['BLOCK_M']}" in text
    assert warps in (4, 8)
    assert stages >= 2
