"""Which calls the attention kernel for sm_90 takes, and what is said of the others. What it computes: `tests/ptx`."""

import importlib.util
import sys
from typing import Any

import pytest
import torch

import orthorank_kernels as ok
from orthorank_kernels import launch_plan
from orthorank_kernels.triton import attention as launchers
from orthorank_kernels.triton import attention_launch
from orthorank_kernels.triton.hopper import launch as hopper
from tests.orthorank_kernels.fake_gpu import Gpus, fake_gpus

pytest.importorskip("triton")
HALF, FLOAT, INT = torch.bfloat16, torch.float32, torch.int32
USUAL, NEW = "sparse_query_attention_kernel", "hopper_attention_kernel"


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch):
    monkeypatch.setenv("ORTHORANK_ATTENTION", "hopper")


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def call(
    selected: int = 999, keys: int = 3000, dim: int = 128, dtype: torch.dtype = HALF, slack: int = 0, **options: Any
) -> None:
    """Two groups of four heads, or of as many as ``group`` says."""
    group, window, softcap = options.get("group", 4), options.get("window"), options.get("softcap")
    q, k = empty(2, 2 * group, selected, dim, dtype=dtype), empty(2, 2, keys, dim + slack, dtype=dtype)[..., :dim]
    starts = empty(2, dtype=INT) if options.get("starts") else None
    sinks = empty(2 * group) if options.get("sinks") else None
    lse = bool(options.get("lse"))
    tables: dict[str, Any] = {}
    if options.get("rotary"):
        tables = {f"rotary_{n}": empty(1, keys, dim) for n in ("cos", "sin")} | {"rotary_dim": dim}
        tables["rotary_interleaved"] = bool(options.get("interleaved"))
    positions = empty(2, selected, dtype=INT)
    launchers.sparse_query_attention(q, k, k, positions, 0.1, window, starts, 0, softcap, sinks, lse, **tables)


def launched(gpus: Gpus) -> list[str]:
    return [name for name, _, _ in gpus.launches]


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, HALF])
def test_it_runs_where_it_is_asked_for(dim, dtype, monkeypatch):
    with fake_gpus() as gpus:
        call(dim=dim, dtype=dtype, starts=True, lse=True, rotary=True, interleaved=True)
        assert launched(gpus) == [NEW]
        assert gpus.launches[0][2]["INTERLEAVED"]
        monkeypatch.delenv("ORTHORANK_ATTENTION")
        call(dim=dim, dtype=dtype)
        assert launched(gpus) == [NEW, USUAL]


def test_windows_caps_and_sinks_are_taken():
    with fake_gpus() as gpus:
        call(window=100, sinks=True)
        call(window=2**40, softcap=30.0)
    (_, _, first), (_, _, second) = gpus.launches
    assert [name for name, _, _ in gpus.launches] == [NEW, NEW]
    assert (first["window"], first["sinks_ptr"] is None, first["SOFTCAP"]) == (100, False, False)
    assert (second["window"], second["sinks_ptr"] is None, second["SOFTCAP"]) == (2**31 - 1, True, True)


def test_programs_are_numbered_in_groups_of_lanes_whose_keys_the_cache_holds():
    """Two batch rows of two columns each; the longest tiles of all lanes come first: see `find_work`."""
    with fake_gpus() as gpus:
        call()
    ((_, _, options),) = gpus.launches
    assert (options["columns"], options["lanes"], options["lanes_together"]) == (2, 4, 4)
    assert options["tiles"] == -(-999 // 32), "of two parts with sixteen queries of four heads each"


def test_tiles_hold_whole_queries_of_a_group():
    """Seven heads: a part of 64 rows has nine queries, and a tile has two parts."""
    with fake_gpus() as gpus:
        call(group=7)
    ((name, _, options),) = gpus.launches
    assert (name, options["GROUP"], options["PACK"]) == (NEW, 7, 7)


@pytest.mark.parametrize(("dim", "block"), [(64, (128, 64)), (96, (128, 128)), (192, (64, 256)), (256, (64, 256))])
def test_blocks_of_keys_are_filled_up_to_a_power_of_two(dim, block):
    with fake_gpus() as gpus:
        call(dim=dim)
    ((_, _, options),) = gpus.launches
    assert (options["BLOCK_N"], options["BLOCK_D"], options["HEAD_DIM"]) == (*block, dim)
    assert [options[name].block_shape for name in ("k_desc", "v_desc")] == [[1, 1, *block]] * 2


@pytest.mark.parametrize(
    ("what", "kernels"),
    [
        ({"selected": 3, "keys": 500}, [USUAL]),
        ({"selected": 16, "keys": 500}, [USUAL]),
        ({"selected": 3, "keys": 90_000}, [USUAL, "combine_kernel"]),
    ],
)
def test_few_queries_stay_with_the_usual_kernel(what, kernels):
    with fake_gpus() as gpus:
        call(**what)
    assert launched(gpus) == kernels


def test_programs_share_keys_where_they_would_leave_the_gpu_idle():
    """Eight programs for 132 multiprocessors: sixteen times as many leave sums, which a second kernel joins."""
    with fake_gpus() as gpus:
        call(selected=40, keys=90_000, lse=True)
    (name, _, given), (second, _, joined) = gpus.launches
    assert (name, second) == (NEW, "combine_kernel")
    assert (given["tiles"] * given["lanes"], given["splits"], given["SPLIT"]) == (8, 16, True)
    assert given["out_ptr"] is joined["sums_ptr"]
    assert given["lse_ptr"] is joined["peaks_ptr"]
    assert given["totals_ptr"] is joined["totals_ptr"]
    assert given["stride_out_split"] == 2 * 40 * 8 * 128


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": FLOAT}, "takes float16 and bfloat16, and q has float32"),
        ({"dim": 80}, "takes head_dim 64, 96, 128, 192 and 256, and q has 80"),
        ({"keys": 0}, "no dimension may be empty"),
        ({"slack": 1}, "multiples of 16 bytes"),
        ({"dim": 80, "selected": 3}, "takes head_dim 64, 96, 128, 192 and 256, and q has 80"),
    ],
)
def test_what_it_does_not_take_is_named(options, reason):
    with fake_gpus() as gpus, pytest.raises(ValueError, match=reason) as raised:
        call(**options)
    assert launched(gpus) == []
    assert "leave ORTHORANK_ATTENTION out" in str(raised.value)


def test_packed_keys_are_taken():
    with fake_gpus() as gpus:
        q, k = empty(3000, 8, 128), empty(5000, 2, 128)
        ends, positions = empty(3, dtype=INT), empty(3000, dtype=INT)
        launchers.sparse_query_attention_varlen(q, k, k, positions, ends, ends, None, 0.1, None, None, None, False)
    assert launched(gpus) == [NEW]


def call_paged(page: int, dim: int = 128, slack: int = 0, cache: torch.dtype = HALF, **options: Any) -> None:
    kept = empty(99, page, 2, dim + slack, dtype=cache)[..., :dim]
    q, positions = empty(3000, 8, dim, dtype=options.get("dtype", HALF)), empty(3000, dtype=INT)
    tables, lengths = empty(2, 40, dtype=INT), empty(2, dtype=INT)
    launchers.sparse_query_attention_paged(
        q, kept, kept, positions, empty(3, dtype=INT), tables, lengths, None, None, 0.1, options.get("window"), None,
        None, None, None, False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"page": 16}, 16),
        ({"page": 32}, 32),
        ({"page": 1024}, 128),
        ({"page": 1024, "dim": 256}, 64),
        ({"page": 1024, "window": 99}, 16),
    ],
)
def test_pages_are_copied_as_far_as_a_block_goes_and_with_a_window_by_sixteen_rows(options, rows):
    with fake_gpus() as gpus:
        call_paged(**options)
    ((name, _, given),) = gpus.launches
    assert (name, given["PAGE_SIZE"], given["n_pages"], given["most_keys"]) == (
        NEW, options["page"], 99, 40 * options["page"],
    )  # fmt: skip
    assert [given[of].block_shape[2] for of in ("k_desc", "v_desc")] == [rows, rows]


@pytest.mark.parametrize(
    "options",
    [
        {"page": 8},
        {"page": 48},
        {"page": 16, "cache": torch.float8_e4m3fn},
        {"page": 16, "slack": 1},
    ],
)
def test_caches_that_no_copy_takes_stay_with_the_usual_kernel(options):
    with fake_gpus() as gpus:
        call_paged(**options)
    assert launched(gpus) == [USUAL]


def test_other_gpus_are_named():
    with fake_gpus("sm_80"), pytest.raises(ValueError, match=r"compute capability 9\.0, and this is sm_80"):
        call()


def test_other_values_of_the_variable_are_an_error(monkeypatch):
    monkeypatch.setenv("ORTHORANK_ATTENTION", "fast")
    with fake_gpus(), pytest.raises(ValueError, match=r"'fast'; it must be 'hopper'"):
        call()


def test_without_gluon_the_request_is_an_error_and_everything_else_works(monkeypatch):
    """The launchers do not import it; an older Triton has one that is not enough."""
    monkeypatch.setitem(sys.modules, "triton.experimental", None)
    for module in (hopper, attention_launch):
        found = importlib.util.spec_from_file_location("again", module.__file__)
        found.loader.exec_module(importlib.util.module_from_spec(found))
    monkeypatch.setattr(hopper, "version", lambda name: "3.5.1")
    with fake_gpus() as gpus:
        with pytest.raises(ValueError, match=r"needs Triton 3\.6 or newer"):
            call()
        monkeypatch.delenv("ORTHORANK_ATTENTION")
        call()
    assert launched(gpus) == [USUAL]


def test_a_launch_plan_belongs_to_one_value_of_the_variable(monkeypatch):
    monkeypatch.setattr(launch_plan, "DEVICES", {"cpu"})
    x = torch.ones(4)

    def key() -> Any:
        return launch_plan._look(ok.gather_rows, (x,), {}, False)[0]

    with_it = key()
    assert key() == with_it
    monkeypatch.delenv("ORTHORANK_ATTENTION")
    assert key() != with_it
