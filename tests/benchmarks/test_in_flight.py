"""What a row kernel has on its way from memory while it works, read off its machine code."""

import pytest

pytest.importorskip("triton")

from benchmarks.static import fingerprint, sass
from benchmarks.static.case import Case, empty, launch
from benchmarks.static.cases import CASES
from benchmarks.static.in_flight import bytes_behind_the_wait

# A ring: before the loop two groups are on their way; it waits for all but one, and starts another behind its work.
LOOP = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR22][R4.64] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2+0x800], desc[UR22][R4.64] ;
        /*0030*/                   LDGDEPBAR ;
.L_x_0:
        /*0040*/                   DEPBAR.LE SB0, 0x1 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   FADD R1, R1, R1 ;
        /*0070*/              @!P1 LDGSTS.E.BYPASS.128 [R3], desc[UR22][R6.64] ;
        /*0080*/              @!P1 LDGSTS.E.BYPASS.128 [R3+0x400], desc[UR22][R6.64] ;
        /*0090*/                   LDGDEPBAR ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("before", "after", "most"),
    [
        ("", "", 32),
        ("SB0, 0x1", "SB0, 0x2", 64),
        ("SB0, 0x1", "SB0, 0x0", 0),
        ("FADD R1, R1, R1", "LDGDEPBAR", 16),  # each copy a group of its own: one of them is left
        ("BYPASS.128 [R3", "BYPASS.64 [R3", 16),
        ("LDGSTS.E.BYPASS.128 [R3", "LDG.E.128 R3, [R3", 0),  # which the compiler may put anywhere
        ("@P0 BRA", "NOP", 0),
    ],
)
def test_what_is_left_behind_the_wait_of_a_loop(before: str, after: str, most: float) -> None:
    assert bytes_behind_the_wait(sass.parse(LOOP.replace(before, after))) == most


def test_the_limit_stands_where_it_was_asked_for_and_makes_what_measures_it_count() -> None:
    limits = {case.name: case.limits_for("sm_90") for case in CASES}
    for hidden, behind in ((2048, 48), (3072, 64), (4096, 48), (8192, 48)):
        asked = limits[f"rms_norm_score {hidden} 2048 tokens bfloat16"]
        assert (asked["min_in_flight"], asked["min_occupancy"]) == (behind << 10, 0.37)
    for kind in ("", " threshold", " packed", " packed threshold"):
        assert limits[f"rms_norm_select 4096 2048 tokens bfloat16{kind}"]["min_in_flight"] == 48 << 10
    plain = Case("rows", "gather", launch("rows.gather_rows", empty(2, 8, 64), empty(2, 3)))
    limited = Case("rows", "gather", plain.launch, at={"sm_90": {"min_in_flight": 1}})
    assert fingerprint.measuring(limited)[-1].name == "in_flight.py"
    assert fingerprint.keys(plain, ["sm_90"], "3.9.0") != fingerprint.keys(limited, ["sm_90"], "3.9.0")
