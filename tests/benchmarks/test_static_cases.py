"""The list of compiled cases holds what the attention launcher can choose: every kind of problem, split or whole."""

import itertools
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface

from benchmarks.static.cases_attention import attention_cases
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton import configs

OP = "sparse_query_attention"
LAYOUTS = ("batch", "packed", "paged")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, bool, str]]:
    """Kind, whether keys are split, and layout of each case."""
    found: set[tuple[str, bool, str]] = set()
    kinds: list[str] = []
    kind_of = configs.attention_kind

    def attention_kind(*args: Any) -> str:
        kinds.append(kind_of(*args))
        return kinds[-1]

    def noted(kernel: Any, grid: Any) -> Any:
        def launch(**options: Any) -> None:
            if "SPLIT" in options:
                layout = "paged" if options["PAGE_SIZE"] else "packed" if options["PACKED"] else "batch"
                found.add((kinds[-1], options["SPLIT"], layout))

        return launch

    monkeypatch.setattr(configs, "attention_kind", attention_kind)
    monkeypatch.setattr(configs, "_gpu_target", lambda index: "sm_90")
    monkeypatch.setattr(KernelInterface, "__getitem__", noted)
    for case in attention_cases():
        case.launch()
    return found


def test_every_kind_is_compiled_split_and_whole(compiled: set[tuple[str, bool, str]]) -> None:
    wanted = set(itertools.product(_settings.kinds(OP), (False, True)))
    assert {(kind, split) for kind, split, _ in compiled} == wanted


def test_the_gated_kinds_are_compiled_in_every_layout(compiled: set[tuple[str, bool, str]]) -> None:
    kinds = ("16-bit, head_dim 64", "16-bit, head_dim 128")
    missing = set(itertools.product(kinds, (False, True), LAYOUTS)) - compiled
    assert not missing


def test_few_queries_are_compiled_split_over_packed_keys_and_pages(compiled: set[tuple[str, bool, str]]) -> None:
    kinds = [f"16-bit, head_dim {dim}, {rows} rows" for dim in (64, 128) for rows in configs.FEW_ROWS]
    missing = set(itertools.product(kinds, (True,), ("packed", "paged"))) - compiled
    assert not missing
