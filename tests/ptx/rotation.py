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
from tests.ptx.worker import prepare


def main() -> None:
    settings, compared = prepare(sys.argv[1]), 0
    settings.seed, settings.resident = None, 3
    for case in rotary_cases():
        if case.dtype not in (HALF, HALF16):
            continue
        given = case.arguments(case.dtype)
        found = ok.sparse_query_attention_varlen(**given, backend="triton")
        cos, sin = given.pop("rotary_cos"), given.pop("rotary_sin")
        how = {"interleaved": given.pop("rotary_interleaved"), "rotary_dim": given.pop("rotary_dim")}
        given["q"] = ok.apply_rotary_at(given["q"], cos, sin, given["positions"], **how, backend="triton")
        expected = ok.sparse_query_attention_varlen(**given, backend="triton")
        assert torch.equal(found, expected), f"{case.title}: {(found - expected).abs().max()}"
        compared += 1
    print(compared)


if __name__ == "__main__":
    main()
