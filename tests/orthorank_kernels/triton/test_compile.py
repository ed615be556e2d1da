"""Every kernel compiles for NVIDIA and AMD GPUs that need not be present, within limits that a GPU's speed hangs on.

The interpreter checks what a kernel computes. It has no registers, no shared memory and no spills; this has.
"""

from pathlib import Path

import pytest

from benchmarks.static import sass
from benchmarks.static.case import TARGETS, Case, broken_limits
from benchmarks.static.cases import CASES, GROUPS
from benchmarks.static.run import ROOT, measurements, triton_version
from benchmarks.static.store import Store

pytest.importorskip("triton")
if not sass.tool("nvdisasm").exists():
    pytest.skip("this Triton comes without NVIDIA's disassembler", allow_module_level=True)


REPORT = Store(ROOT / "benchmarks" / "results" / "static.json")
VERSION = tuple(map(int, triton_version().split(".")[:2]))
# An older compiler has other registers and loops: there everything need only compile, to what a GPU can launch.
HAS_LIMITS = VERSION >= (3, 9)


def complaints(target: str, cases: list[Case], measured: dict[str, dict]) -> list[str]:
    found = []
    for case in cases:
        result = measured.get(case.name, {"error": "was not compiled"})
        if "error" in result:
            found.append(f"{case.name}: {result['error']}")
            continue
        launches = {"launches": case.limits.get("launches", 1)}
        limits = case.limits_for(target) if HAS_LIMITS else launches
        found += [f"{case.name}: {broken}" for broken in broken_limits(result, limits, target)]
    return found


def check(target: str, cases: list[Case], measured: dict[str, dict]) -> None:
    if VERSION < (3, 9) and all("ROCm linker" in m.get("error", "") for m in measured.values()):
        pytest.skip("this Triton comes without AMD's linker")
    assert cases
    assert set(measured) == {case.name for case in cases}
    assert not (found := complaints(target, cases, measured)), f"{target}\n" + "\n".join(found)
    for case in cases:
        assert measured[case.name]["registers"] > 0
        assert measured[case.name]["launches"] == case.limits.get("launches", 1)


def measured_now(target: str, group: str, cases: list[Case], cache: Path, known: dict[str, str]) -> dict[str, dict]:
    if target == "sm_100" and VERSION < (3, 3):
        pytest.skip("this Triton does not know sm_100")
    return {m["case"]: m for m in measurements(target, group, [case.name for case in cases], cache, known)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("group", GROUPS)
def test_default_settings(group: str, target: str, tmp_path: Path) -> None:
    """What the compiler would be asked for again is taken from the committed report, but for the first case: that is
    compiled, and found to be what is committed."""
    cases = [case for case in CASES if case.group == group and not case.slow]
    rows = {case.name: REPORT.rows.get((target, group, case.name), {}) for case in cases}
    first, *others = rows
    measured = measured_now(target, group, cases, tmp_path, {name: rows[name].get("asked", "") for name in others})
    again = {name for name, m in measured.items() if m.keys() == {"case", "asked"}}
    check(target, cases, {name: rows[name] if name in again else m for name, m in measured.items()})
    if measured[first]["asked"] == rows[first].get("asked"):
        both = measured[first].keys() & rows[first].keys()
        assert {key: measured[first][key] for key in both} == pytest.approx(
            {key: rows[first][key] for key in both}, abs=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("group", GROUPS)
def test_everything_a_launcher_can_choose(group: str, target: str, tmp_path: Path) -> None:
    """Compiled, the default settings too, whatever is committed."""
    cases = [case for case in CASES if case.group == group]
    check(target, cases, measured_now(target, group, cases, tmp_path, {}))


def test_names_are_unique_within_a_group():
    names = [(case.group, case.name) for case in CASES]
    assert len(names) == len(set(names))


GOOD = {"launches": 1, "shared": 0, "warps": 4, "registers": 60, "spills": 0, "wide_loads": 1.0, "ntm": 850}


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({}, None),
        ({"registers": 65}, "registers is 65, at most 64"),
        ({"spills": 1}, "spills is 1, at most 0"),
        ({"wide_loads": 0.5}, "wide_loads is 0.5, at least 0.9"),
        ({"shared": 170_000}, "shared is 1.7e+05, at most 166912"),
        ({"warps": 33}, "warps is 33, at most 32"),
        ({"launches": 2}, "launches is 2, at most 1"),
        ({"ntm": 901}, "ntm is 901, at most 900"),
        ({"ntm": None}, "ntm was not measured"),
    ],
)
def test_a_broken_limit_is_named(changed, complaint):
    limits = {"registers": 64, "spills": 0, "min_wide_loads": 0.9, "ntm": 900}
    assert broken_limits(GOOD | changed, limits, "sm_80") == ([complaint] if complaint else [])


def test_what_a_target_cannot_measure_breaks_no_limit():
    assert broken_limits(GOOD | {"ntm": None}, {"ntm": 900}, "gfx942") == []
    assert broken_limits(GOOD | {"warps": 32}, {}, "gfx942") == ["warps is 32, at most 16"]
    assert broken_limits(GOOD | {"registers": None}, {"registers": 64}, "gfx942") == ["registers was not measured"]


def test_a_case_that_fails_to_compile_is_named():
    case = Case("rows", "gather", launch=lambda: None)
    assert complaints("sm_90", [case], {"gather": {"error": "CompilationError: no"}}) == [
        "gather: CompilationError: no"
    ]
    assert complaints("sm_90", [case], {}) == ["gather: was not compiled"]


LISTING = """
.text.kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0020*/                   STL [R1], R7 ;
.L_x_0:
        /*0030*/                   LDL R7, [R1] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/               @P2 BRA `(.L_x_3) ;
.L_x_4:
        /*0060*/                   FADD R8, R8, R7 ;
        /*0070*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
.L_x_5:
        /*0090*/                   SYNCS.PHASECHK.TRYWAIT P3, [UR4], R2 ;
        /*00a0*/              @!P3 BRA `(.L_x_5) ;
        /*00b0*/                   BRA P1, `(.L_x_1) ;
        /*00c0*/                   STG.E desc[UR4][R2.64], R8 ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   FMUL R7, R7, R7 ;
        /*00f0*/                   BRA `(.L_x_4) ;
.L_x_2:
        /*0100*/                   BRA `(.L_x_2) ;
        /*0110*/                   NOP ;
"""


def test_machine_code_is_read_right():
    code = sass.parse(LISTING)
    assert code[-1].address == 0xF0, "what follows is padding"
    assert sass.count(code, sass.SPILLS) == 2
    assert sass.wide_share(code, ("LDG",)) == 128 / 144
    assert sass.wide_share(code, ("STG",)) == 0
    assert sass.wide_share(code, ("ATOM",)) is None


def test_loops_are_found_with_what_lies_elsewhere_and_without_waiting():
    hopper, ampere = sass.matrix_loops(sass.parse(LISTING))
    assert [i.base for i in ampere] == ["LDL", "HMMA", "BRA", "FADD", "BRA", "FMUL", "BRA"]
    assert [i.base for i in hopper] == ["HGMMA", "BRA"]
    assert sass.count(ampere, sass.SPILLS) == 1
    assert ampere[1].flops == 2 * 16 * 8 * 16
    assert hopper[0].flops == 2 * 64 * 128 * 16 / 4


DIVERGING = """
        /*0000*/                   BSSY B0, `(.L_x_1) ;
        /*0010*/               @P2 BRA `(.L_x_0) ;
        /*0020*/                   STG.E desc[UR4][R2.64], R8 ;
.L_x_0:
        /*0030*/                   BSYNC B0 ;
.L_x_1:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   BSSY B0, `(.L_x_3) ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/                   STG.E desc[UR4][R2.64], R8 ;
.L_x_2:
        /*0090*/                   BSYNC B0 ;
.L_x_3:
        /*00a0*/                   EXIT ;
"""


def test_threads_that_parted_meet_where_they_parted_last():
    """One barrier register serves two places; with a single meeting point the loop between them is reached by none."""
    (loop,) = sass.matrix_loops(sass.parse(DIVERGING))
    assert [i.base for i in loop] == ["HGMMA", "BRA"]
