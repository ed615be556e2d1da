"""Cases of the row kernels: gather, scatter, add and norm, low-rank maps, rotary embedding, writes to a paged cache."""

from collections.abc import Iterator

import torch

from benchmarks.static.case import FLOAT, HALF, Case, empty, launch, name_of, some_positions

# No spills, no atomics, rows move 128 bits at a time. Spill limits are for 16-bit types.
COPY = {"registers": 56, "spills": 0, "atomics": 0, "min_wide_loads": 0.969, "min_wide_stores": 1.0}
NORM = {**COPY, "registers": 64, "min_wide_loads": 0.95}
# Of a hidden size that no power of two above 8 divides, or of a few hundred bytes, a thread moves few bytes at a time.
NARROW = {"registers": 96, "min_wide_loads": 0.0, "min_wide_stores": 0.0}


def row_cases() -> Iterator[Case]:
    everyday = (576, 4096)
    others = (64, 577, 896, 1000, 2048, 8192, 14336, 20480)
    shapes = [(h, d) for h in (*everyday, *others) for d in (HALF, FLOAT)] + [(h, torch.float16) for h in everyday]
    for hidden, dtype in shapes:
        slow = hidden not in everyday or dtype != HALF
        narrow = NARROW if hidden % 16 or hidden < 512 else {}
        if hidden * dtype.itemsize < 4096:
            narrow = {"min_wide_loads": 0.9} | narrow  # the one load of a position weighs more
        # A longer row takes more than 16 registers of each thread for each of its tensors.
        long = {"registers": 128} if hidden * dtype.itemsize > 16384 else {}
        if hidden * dtype.itemsize > 65536:
            long["spills"] = 64
        x, rows = empty(4, 2048, hidden, dtype=dtype), empty(4, 682, hidden, dtype=dtype)
        positions, weight = some_positions(4, 682), empty(hidden, dtype=dtype)
        for module, op, args, limits in (
            ("rows", "gather_rows", (x, positions), COPY | narrow),
            ("rows", "scatter_rows_", (x, positions, rows), COPY | narrow),
            ("rows", "scatter_add_rows_", (x, positions, rows, rows), COPY | {"registers": 64} | narrow),
            ("add_norm", "gather_add_rms_norm", (x, positions, rows, weight, 1e-5), NORM | narrow | long),
        ):
            yield Case("rows", f"{op} {hidden} {name_of(dtype)}", launch(f"{module}.{op}", *args), limits, slow=slow)


def add_norm_cases() -> Iterator[Case]:
    """What other families add: norms, biases, a scale, a norm of the addend."""
    variants = {
        "layer": ("layer", True, 0.0, 1.0, False),
        "sandwich": ("rms", False, 1.0, 1.0, True),
        "addend's norm alone": ("identity", False, 0.0, 0.22, True),
    }
    for hidden, dtype in ((4096, HALF), (4096, FLOAT), (576, HALF), (2304, HALF), (8192, HALF)):
        x, rows, vector = (
            empty(4, 2048, hidden, dtype=dtype),
            empty(4, 682, hidden, dtype=dtype),
            empty(hidden, dtype=dtype),
        )
        for name, (norm, bias, offset, scale, addend_norm) in variants.items():
            arguments = (
                x,
                some_positions(4, 682),
                rows,
                None if norm == "identity" else vector,
                1e-5,
                norm,
                vector if bias else None,
                offset,
                scale,
                vector if addend_norm else None,
            )
            yield Case(
                "rows",
                f"gather_add_rms_norm {name} {hidden} {name_of(dtype)}",
                launch("add_norm.gather_add_rms_norm", *arguments),
                {"registers": 96 if hidden <= 4096 else 112, "spills": 0, "atomics": 0, "min_wide_stores": 1.0},
                slow=(hidden, dtype) != (4096, HALF),
            )


def low_rank_cases() -> Iterator[Case]:
    """Ranks of one block and of several; maps of a batch with padding, and of a packed one."""
    everyday = (4096, 64, HALF)
    shapes = (everyday, (576, 64, HALF), (4096, 128, HALF), (4096, 512, HALF), (4096, 64, FLOAT), (577, 100, HALF))
    for hidden, rank, dtype in (*shapes, (4096, 64, torch.float16), (8192, 16, HALF)):
        # Rows that begin anywhere move number by number, each with an address of its own.
        limits = {"registers": 216, "spills": 0, "min_wide_stores": 1.0} if hidden % 8 == 0 else {"registers": 255}
        up, bias, rows = empty(hidden, rank, dtype=dtype), empty(hidden, dtype=dtype), empty(4, dtype=torch.int32)
        x, low = empty(4, 2048, hidden, dtype=dtype), empty(4, 2048, rank, dtype=dtype)
        one = x.view(1, -1, hidden), low.view(1, -1, rank), up, bias
        for name, arguments in (
            ("", (x, low, up, bias, rows, rows, rows, None)),
            (" packed", (*one, None, None, rows, empty(5, dtype=torch.int32))),
        ):
            yield Case(
                "rows",
                f"add_low_rank {hidden} rank {rank}{name} {name_of(dtype)}",
                launch("low_rank.add_low_rank", *arguments),
                {**limits, "atomics": 0},
                slow=(hidden, rank, dtype) != everyday,
            )


def activation_cases() -> Iterator[Case]:
    """Two projections and a merged one, with positions to stop at and without."""
    for width, dtype in (
        (14336, HALF),
        (14336, FLOAT),
        (1536, HALF),
        (11008, torch.float16),
        (577, HALF),
        (28672, HALF),
    ):
        merged = empty(4, 682, 2 * width, dtype=dtype)
        for name, gate, up in (
            ("", empty(4, 682, width, dtype=dtype), empty(4, 682, width, dtype=dtype)),
            (" merged", merged[..., :width], merged[..., width:]),
        ):
            wide = width % 16 == 0
            yield Case(
                "rows",
                f"silu_and_mul{name} {width} {name_of(dtype)}",
                launch("activation.silu_and_mul", gate, up, some_positions(4, 682) if name else None),
                {"registers": 64, "spills": 0, "atomics": 0}
                | ({"min_wide_loads": 0.96, "min_wide_stores": 1.0} if wide else {}),
                slow=(width, dtype) != (14336, HALF),
            )


def rotary_cases() -> Iterator[Case]:
    everyday = ((32, 128, 128), (32, 64, 64), (9, 64, 64))
    others = ((8, 128, 128), (32, 32, 32), (71, 64, 64), (32, 80, 32), (24, 96, 96), (32, 80, 80), (8, 256, 256),
              (16, 256, 64), (128, 128, 128), (1, 256, 256))  # fmt: skip
    shapes = [(shape, dtype, True) for shape in (*everyday, *others) for dtype in (HALF, FLOAT)]
    shapes += [(shape, dtype, False) for shape in everyday for dtype in (HALF, torch.float16)]
    yield from interleaved_cases()
    for (heads, head_dim, rotary_dim), dtype, gathered in shapes:
        slow = (heads, head_dim, rotary_dim) not in everyday or dtype != HALF or not gathered
        x, table = empty(4, 682, heads, head_dim, dtype=dtype).transpose(1, 2), empty(1, 682, rotary_dim, dtype=dtype)
        yield Case(
            "rows",
            f"apply_rotary_at {heads} x {head_dim}/{rotary_dim} {name_of(dtype)}" + ("" if gathered else " all tokens"),
            launch("rotary.apply_rotary_at", x, table, table, some_positions(4, 682) if gathered else None),
            {"registers": 96, "spills": 0, "atomics": 0, "min_wide_stores": 0.0 if slow else 1.0},
            slow=slow,
        )


def kv_cache_cases() -> Iterator[Case]:
    """All keys and values of a projection to vLLM's cache, by tables of all positions."""
    everyday = ((8, 128, 128, False), (3, 64, 64, False), (8, 128, 64, True))
    others = ((1, 128, 128, False), (2, 64, 64, False), (32, 128, 128, False), (8, 96, 96, False), (32, 80, 32, False),
              (4, 256, 256, False), (8, 256, 64, False), (71, 64, 64, False), (8, 128, 128, True))  # fmt: skip
    for shape, dtype in ((shape, dtype) for shape in (*everyday, *others) for dtype in (HALF, FLOAT)):
        heads, head_dim, rotary_dim, interleaved = shape
        merged, slots = empty(2048, 4 * heads, head_dim, dtype=dtype), empty(2048, dtype=torch.int64)
        caches = empty(4096, heads, 16, 2 * head_dim, dtype=dtype).transpose(1, 2).split(head_dim, -1)
        keys, values = merged[:, 2 * heads :].split(heads, 1)
        tables = empty(32768, rotary_dim, dtype=dtype).split(rotary_dim // 2, -1)
        slow = shape not in everyday or dtype != HALF
        yield Case(
            "rows",
            f"apply_rotary_and_cache_{' interleaved' if interleaved else ''} {heads} x {head_dim}/{rotary_dim} "
            f"{name_of(dtype)}",
            launch(
                "kv_cache.apply_rotary_and_cache_",
                *caches,
                slots,
                keys,
                values,
                *tables,
                slots,
                interleaved,
                rotary_dim,
            ),
            {"registers": 128, "spills": 0, "atomics": 0, "min_wide_stores": 0.0 if slow or heads < 8 else 1.0},
            slow=slow,
        )


def interleaved_cases() -> Iterator[Case]:
    shapes = ((32, 128, 64), (32, 128, 128), (9, 64, 64), (32, 80, 32), (8, 256, 256))
    for shape, dtype in ((shape, dtype) for shape in shapes for dtype in (HALF, FLOAT)):
        heads, head_dim, rotary_dim = shape
        x, table = empty(4, 682, heads, head_dim, dtype=dtype).transpose(1, 2), empty(1, 682, rotary_dim, dtype=dtype)
        yield Case(
            "rows",
            f"apply_rotary_at interleaved {heads} x {head_dim}/{rotary_dim} {name_of(dtype)}",
            launch("rotary.apply_rotary_at", x, table, table, some_positions(4, 682), True),
            {"registers": 96, "spills": 0, "atomics": 0, "min_wide_stores": 1.0},
            slow=(shape, dtype) != (shapes[0], HALF),
        )
