"""What the test suite runs: calls of public ops, by group. One row of a table is one call; add rows freely.

A case names an op of `orthorank_kernels` and makes its arguments from a dtype. It is run with ``backend="triton"``,
which here is the compiled PTX, and compared with ``backend="torch"`` by the error budget of
`tests.orthorank_kernels.tools`. Shapes are odd and small: the kernels are as they are, so a program costs the same
whatever it leaves idle.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import orthorank_kernels
from tests.orthorank_kernels.every_op import IN_PLACE, Numbers, Sizes, calls
from tests.ptx.case import FLOAT, HALF, HALF16, Case, ints, random
from tests.ptx.cases_attention import attention_cases
from tests.ptx.cases_hopper import hopper_cases

POSITIONS = ints([0, 3, 6, 8], [1, 5, -1, -1])


def weight(hidden: int, dtype: torch.dtype) -> Tensor:
    return (1 + random(hidden, seed=7) / 8).to(dtype)


def row_cases() -> Iterator[Case]:
    def gather(dtype: torch.dtype, hidden: int = 200) -> dict[str, Any]:
        return {"x": random(2, 9, hidden, dtype=dtype), "positions": POSITIONS}

    def gather_add(dtype: torch.dtype, hidden: int = 200) -> dict[str, Any]:
        return {
            "hidden_states": random(2, 9, hidden, dtype=dtype),
            "positions": POSITIONS,
            "addend": random(2, 4, hidden, dtype=dtype, seed=1),
            "weight": weight(hidden, dtype),
            "eps": 1e-5,
        }

    def scatter(dtype: torch.dtype, hidden: int = 200) -> dict[str, Any]:
        rows = random(2, 4, hidden, dtype=dtype, seed=1)
        return {"out": random(2, 9, hidden, dtype=dtype), "positions": POSITIONS, "rows": rows}

    for hidden in (200, 577, 1200, 4096, 5000):
        for dtype in (HALF, HALF16, FLOAT):
            slow = (hidden, dtype) not in ((200, HALF), (577, HALF16), (200, FLOAT), (4096, HALF))
            name = f"hidden {hidden}"
            yield Case("rows", "gather_rows", name, dtype, lambda d, h=hidden: gather(d, h), slow)
            yield Case("rows", "gather_add_rms_norm", name, dtype, lambda d, h=hidden: gather_add(d, h), slow)
            yield Case("rows", "scatter_rows_", name, dtype, lambda d, h=hidden: scatter(d, h), slow, writes=("out",))
    yield from low_rank_cases()
    # As with many rows, of which a program takes several.
    few = {"gather_add_rms_norm": {"few_rows": 1, "rows": 3}}
    large = lambda d: gather_add(d, 4096)  # noqa: E731
    yield Case("rows", "gather_add_rms_norm", "hidden 4096, several rows a program", HALF, large, settings=few)
    plain = lambda d: {**gather_add(d, 64), "weight": None}  # noqa: E731
    unnormed = lambda d: {**plain(d), "norm": "identity"}  # noqa: E731
    for dtype in (HALF, HALF16, FLOAT):
        yield Case("rows", "gather_add_rms_norm", "no weight", dtype, plain, slow=True)
        yield Case("rows", "gather_add_rms_norm", "no norm", dtype, unnormed, slow=dtype != HALF)
        pair = lambda d: {"gate": random(3, 1100, dtype=d), "up": random(3, 1100, dtype=d, seed=1)}  # noqa: E731
        yield Case("rows", "silu_and_mul", "width 1100", dtype, pair, slow=True)


def low_rank_cases() -> Iterator[Case]:
    """Tiles that tokens and columns leave, ranks of less than a block and of several, in a batch and packed.

    Past the rank lie NaN, as columns of a merged product may.
    """

    def columns(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
        wide = random(*shape[:-1], shape[-1] + 12, dtype=dtype, seed=seed)
        wide[..., shape[-1] :] = torch.nan
        return wide[..., : shape[-1]]

    sinks = {"sink_positions": ints(1, -1)}
    batch = {**sinks, "starts": ints(1, 0), "lengths": ints(60, 70)}
    packed = {"cu_seqlens": ints(0, 3, 70), **sinks}
    for hidden, rank, more, bias in ((200, 20, batch, True), (136, 100, packed, True), (133, 16, {}, False)):
        for dtype in (HALF, HALF16, FLOAT):

            def mapped(d: torch.dtype, h: int = hidden, r: int = rank, m: dict = more, b: bool = bias):
                shape = (71,) if "cu_seqlens" in m else (2, 71)
                states = {"hidden_states": random(*shape, h, dtype=d), "low": columns(*shape, r, dtype=d, seed=1)}
                return {**states, "up": columns(h, r, dtype=d, seed=2), "bias": weight(h, d) if b else None, **m}

            slow = (rank, dtype) not in ((20, HALF), (100, HALF16), (16, FLOAT))
            yield Case("rows", "add_low_rank", f"hidden {hidden}, rank {rank}", dtype, mapped, slow)


def rotary_cases() -> Iterator[Case]:
    shapes = ((3, 64, 64, True), (2, 80, 32, True), (9, 128, 128, False), (1, 256, 256, True))
    for heads, head_dim, rotary_dim, gathered in shapes:
        for dtype in (HALF, HALF16, FLOAT):
            slow = (heads, dtype) not in ((3, HALF), (2, FLOAT), (9, HALF16))

            def rotary(d: torch.dtype, h: int = heads, n: int = head_dim, r: int = rotary_dim, g: bool = gathered):
                angles = random(1, 9, r)
                x = random(2, 4 if g else 9, h, n, dtype=d).transpose(1, 2)
                positions = {"positions": POSITIONS} if g else {}
                return {"x": x, "cos": angles.cos().to(d), "sin": angles.sin().to(d), "rotary_dim": r, **positions}

            name = f"{heads} heads of {head_dim}, {rotary_dim} turned" + ("" if gathered else ", all tokens")
            yield Case("rows", "apply_rotary_at", name, dtype, rotary, slow)


def kv_cache_cases() -> Iterator[Case]:
    """Columns of a projection to views of one cache; among the tokens some without a slot and without a position."""
    shapes = ((3, 64, 64, False), (2, 80, 32, False), (9, 128, 128, False), (2, 40, 16, True))
    for heads, head_dim, rotary_dim, interleaved in shapes:
        for dtype in (HALF, HALF16, FLOAT):
            slow = (heads, head_dim, dtype) not in ((3, 64, HALF), (2, 80, FLOAT), (9, 128, HALF16), (2, 40, HALF))

            def cached(d: torch.dtype, h: int = heads, n: int = head_dim, r: int = rotary_dim, i: bool = interleaved):
                k_cache, v_cache = random(3, h, 4, 2 * n, dtype=d).transpose(1, 2).split(n, -1)
                keys, values = random(6, 2 * h, n, dtype=d)[:, :h], random(6, 2 * h, n, dtype=d, seed=1)[:, :h]
                angles = random(9, r // 2)
                of = {"k_cache": k_cache, "v_cache": v_cache, "slots": ints(11, -1, 12, 0, 5, 6), "keys": keys}
                tables = {"cos": angles.cos().to(d), "sin": angles.sin().to(d), "positions": ints(8, 0, 1, 2, -1, 3)}
                return {**of, "values": values, **tables, "rotary_dim": r, "interleaved": i}

            name = f"{heads} heads of {head_dim}, {rotary_dim} turned"
            writes = ("k_cache", "v_cache")
            yield Case("rows", "apply_rotary_and_cache_", name, dtype, cached, slow, writes=writes)


def score(dtype: torch.dtype, hidden: int, tokens: int, **more: Any) -> dict[str, Any]:
    """``more``: arguments, or functions that make them from a dtype."""
    return {
        "hidden_states": random(2, tokens, hidden, dtype=dtype),
        "weight": weight(hidden, dtype),
        "eps": 1e-5,
        **{key: value(dtype) if callable(value) else value for key, value in more.items()},
    }


def score_cases() -> Iterator[Case]:
    own_sink = {"sink": lambda d: random(2, 200, dtype=d, seed=3)}
    padded = {"starts": ints(0, 2)}
    for name, hidden, tokens, more in (
        ("own sink", 200, 5, own_sink),
        ("padded", 64, 7, padded),
        ("hidden 577", 577, 3, {}),
        ("hidden 4096", 4096, 3, {}),
        ("hidden 5000", 5000, 2, {}),
    ):
        for dtype in (HALF, HALF16, FLOAT):
            slow = (hidden, dtype) not in ((200, HALF), (64, FLOAT), (577, HALF16))
            arguments = lambda d, h=hidden, t=tokens, m=more: score(d, h, t, **m)  # noqa: E731
            yield Case("scores", "rms_norm_score", name, dtype, arguments, slow)
            if hidden < 577:
                ends = {"lengths": ints(5, 3)} if name == "padded" else {}
                fused = lambda d, h=hidden, t=tokens, m=more, e=ends: {**score(d, h, t, **m), "k": 3, **e}  # noqa: E731
                yield Case("scores", "rms_norm_select", name, dtype, fused, slow)
    few = {"rms_norm_score": {"enough_programs": 4}}
    for op, chosen in (("rms_norm_score", {}), ("rms_norm_select", {"k": 3})):
        arguments = lambda d, k=chosen: score(d, 200, 5, **own_sink, **k)  # noqa: E731
        yield Case("scores", op, "own sink, several rows a program", HALF, arguments, settings=few)
    # So many that every place of the copies that run ahead is used again. Copies want rows of a multiple of 16.
    one = {"rms_norm_score": {"enough_programs": 1}}
    own = {"sink": lambda d: random(2, 208, dtype=d, seed=3)}
    many = lambda d: score(d, 208, 9, **own, residual=lambda d: random(2, 9, 208, dtype=d, seed=4))  # noqa: E731
    yield Case("scores", "rms_norm_score", "residual, many rows a program", HALF, many, settings=one)
    fused = lambda d: {**score(d, 208, 9, **own), "k": 3}  # noqa: E731
    yield Case("scores", "rms_norm_select", "many rows a program", HALF, fused, settings=one)
    counted = lambda d: {**score(d, 64, 40, **padded), "k": 13, "lengths": ints(40, 35), "keep_last": 2}  # noqa: E731
    short = {**few, "rms_norm_select": {"tokens": 16}}
    yield Case("scores", "rms_norm_select", "scores counted", HALF, counted, settings=short)
    long = lambda d: {**score(d, 16, 2100), "k": 700}  # noqa: E731
    yield Case("scores", "rms_norm_select", "2100 tokens", HALF, long, slow=True)


def norm_cases() -> Iterator[Case]:
    """Other norms, and what is written beside the scores."""
    every = {
        "residual": lambda d: random(2, 5, 64, dtype=d, seed=4),
        "bias": lambda d: weight(64, d),
        "weight_offset": 1.0,
        "norm": "layer",
        "score": "cosine",
        "copy_input": True,
        "k": 3,
    }
    options = lambda d: score(d, 64, 5, **every)  # noqa: E731
    unweighted = lambda d: {**score(d, 64, 7), "weight": None}  # noqa: E731
    for dtype in (HALF, HALF16, FLOAT):
        yield Case("scores", "rms_norm_select", "LayerNorm, cosine, residual, copy", dtype, options, dtype != HALF)
        for op, more in (("rms_norm_score", {}), ("rms_norm_select", {"k": 4})):
            alone = lambda d, m=more: {**unweighted(d), "write_norm": False, **m}  # noqa: E731
            yield Case("scores", op, "no weight, scores alone", dtype, alone, slow=True)
            unnormed = lambda d, m=more: {**unweighted(d), "norm": "identity", "score": "cosine", **m}  # noqa: E731
            yield Case("scores", op, "no norm, cosine", dtype, unnormed, slow=dtype != HALF)


def selection_cases() -> Iterator[Case]:
    ties = torch.randint(0, 4, (2, 101), generator=torch.Generator().manual_seed(0)).float()
    special = random(2, 101)
    special[0, 3:40:3] = float("nan")
    special[1, ::7], special[1, 1::7] = 0.0, -0.0
    special[0, 50], special[1, 50] = float("inf"), -float("inf")
    for name, scores, more in (
        ("ties", ties, {"k": 33}),
        ("NaN, zeros of both signs, infinities", special, {"k": 70, "keep_last": 2}),
        ("ragged", random(3, 101), {"k": 40, "starts": ints(0, 9, 50), "lengths": ints(101, 17, 60)}),
        ("largest", special, {"k": 40, "starts": ints(9, 50), "largest": True, "relative": True}),
        ("k for each row", random(2, 63), {"k": ints(0, 63), "max_selected": 63}),
    ):
        arguments = lambda d, s=scores, m=more: {"scores": s, **m}  # noqa: E731
        yield Case("scores", "select_tokens", name, FLOAT, arguments, slow=name == "k for each row")
    for tokens in (2500, 9001):
        arguments = lambda d, t=tokens: {"scores": random(1, t), "k": 700}  # noqa: E731
        yield Case("scores", "select_tokens", f"{tokens} tokens", FLOAT, arguments, slow=True)
        below = lambda d, t=tokens: {"scores": random(1, t), "threshold": 0.5}  # noqa: E731
        yield Case("scores", "select_tokens", f"{tokens} tokens, threshold", FLOAT, below, slow=True)
    yield from threshold_and_packed_cases(special)


def many_sequences() -> dict[str, Any]:
    """101 tokens of 258 sequences, most of them empty: more than are looked at in one step."""
    ends = torch.linspace(0, 101, 259).int()
    k = (ends.diff() > 0).int()
    return {"k": k, "max_selected": 101, "cu_seqlens": ends, "keep_last": 1}


def threshold_and_packed_cases(special: Tensor) -> Iterator[Case]:
    """``special``: two rows of 101 scores. Packed, they are five sequences, two of them empty."""
    split = {"cu_seqlens": ints(0, 0, 40, 41, 101, 101), "keep_last": 1}
    later = {**split, "position_offsets": ints(9, 0, 3, 0, 7), "sink_positions": ints(-1, 2, -1, 0, 0)}
    for name, scores, more, slow in (
        ("threshold", special, {"threshold": 0.5, "keep_last": 2, "lengths": ints(101, 60)}, False),
        ("packed", special[0], {"k": ints(3, 13, 0, 99, 4), "max_selected": 64, **split}, False),
        ("packed, threshold", special[1], {"threshold": torch.tensor([0.0, 0.5, 1.0, -0.5, 0.0]), **later}, False),
        ("packed, k in later chunks", special[1], {"k": 5, **later}, True),
        ("packed, 258 sequences", special[0], many_sequences(), True),
        ("packed, small room", special[1], {"threshold": 0.5, "max_selected": 20, **split}, True),
    ):
        arguments = lambda d, s=scores, m=more: {"scores": s, **m}  # noqa: E731
        yield Case("scores", "select_tokens", name, FLOAT, arguments, slow)
    states = {"hidden_states": random(11, 64), "weight": weight(64, FLOAT), "eps": 1e-5, "keep_last": 1}
    ends = {"cu_seqlens": ints(0, 0, 4, 5, 11)}
    for name, more in (("packed", {"k": 2}), ("packed, thresholds", {"threshold": torch.tensor([4.0, 0, 9, 1])})):
        arguments = lambda d, m=more: {**states, **ends, **m}  # noqa: E731
        yield Case("scores", "rms_norm_select", name, FLOAT, arguments)
    wide = {**ends, "hidden_states": lambda d: random(11, 2048, dtype=d)}
    several = lambda d: {**score(d, 2048, 11, **wide), "k": 2}  # noqa: E731
    whole = {"rms_norm_score": {"enough_programs": 1}}
    yield Case("scores", "rms_norm_select", "packed, 2048 channels, many rows a program", HALF, several, settings=whole)


# Of `tests.orthorank_kernels.every_op`, which has a call of every op and layout: so none can be missing here.
SMALL = Sizes(batch=2, tokens=11, selected=5, hidden=64, heads=4, kv_heads=2, head_dim=32)


def every_op_cases() -> Iterator[Case]:
    for name, call in calls(Numbers(), SMALL).items():
        names = inspect.signature(getattr(orthorank_kernels, call.op)).parameters
        for dtype in (HALF, HALF16, FLOAT):

            def arguments(d: torch.dtype, name: str = name) -> dict[str, Any]:
                made = calls(Numbers(), SMALL.with_(dtype=d))[name]
                names = inspect.signature(getattr(orthorank_kernels, made.op)).parameters
                made_of = {**dict(zip(names, made.args, strict=False)), **made.options}
                if "k_scale" in made_of:  # the kernel masks before it scales, so the factor has to be positive
                    made_of["k_scale"] = made_of["k_scale"].abs()
                return made_of

            title = name.partition(", ")[2] or "plain"
            attention = call.op.startswith("sparse")
            yield Case(
                "attention" if attention else "every op",
                call.op,
                f"as in every_op: {title}",
                dtype,
                arguments,
                slow=dtype != HALF or (attention and (call.op == "sparse_query_attention" or title != "plain")),
                writes=tuple(names)[: IN_PLACE.get(call.op, 0)],
            )


CASES: tuple[Case, ...] = (
    *row_cases(),
    *rotary_cases(),
    *kv_cache_cases(),
    *score_cases(),
    *norm_cases(),
    *selection_cases(),
    *attention_cases(),
    *hopper_cases(),
    *every_op_cases(),
)


def cases_for(target: str) -> list[Case]:
    return [case for case in CASES if not case.targets or target in case.targets]


GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
