"""Compiled for absent GPUs, too, attention that rotates its queries gives the bits of `apply_rotary_at` before it.

    python -m tests.ptx.rotation sm_90

Which product a compiler fuses with which sum is its choice; here both kernels' PTX runs. In a process of its own, as
`tests.ptx.worker`. Prints the number of results that were compared.
"""

import sys

import torch

import orthorank_kernels as ok
from tests.ptx.case import HALF, HALF16
from tests.ptx.cases_attention import rotary_cases
from tests.ptx.cases_hopper import hopper_cases
from tests.ptx.worker import forced, prepare


def main() -> None:
    settings, compared = prepare(sys.argv[1]), 0
    settings.seed, settings.resident = None, 3
    for case in (*rotary_cases(), *(case for case in hopper_cases() if "rotary" in case.name)):
        if case.dtype not in (HALF, HALF16) or sys.argv[1] not in (case.targets or (sys.argv[1],)):
            continue
        given, attention = case.arguments(case.dtype), getattr(ok, case.op)
        with forced(case):
            found = attention(**given, backend="triton")
            cos, sin = given.pop("rotary_cos"), given.pop("rotary_sin")
            how = {"interleaved": given.pop("rotary_interleaved", False), "rotary_dim": given.pop("rotary_dim", None)}
            given["q"] = ok.apply_rotary_at(given["q"], cos, sin, given["positions"], **how, backend="triton")
            expected = attention(**given, backend="triton")
        assert torch.equal(found, expected), f"{case.title}: {(found - expected).abs().max()}"
        compared += 1
    print(compared)


if __name__ == "__main__":
    main()
