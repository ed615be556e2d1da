"""Calls of every op with arguments that were changed at random: each is right, or refused by name with nothing written.

Shapes, dtypes, strides, devices, zero sizes, huge and negative numbers, NaN, boundaries that do not fit, things that
are no tensors. Right is what `tests/orthorank_kernels/statements.py` says; refused is an error that this package
raised itself.
"""

import inspect
import linecache
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import orthorank_kernels as ok
from orthorank_kernels.dispatch import BackendError
from tests.orthorank_kernels import statements
from tests.orthorank_kernels.every_op import IN_PLACE, Call, Numbers, Sizes, calls, flat

PACKAGE = str(Path(ok.__file__).parent)
ERRORS = (TypeError, ValueError, IndexError, BackendError)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="values are looked at on a CPU alone")
TOLERANCES = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 2e-4}

Change = Callable[[random.Random, Tensor], Any]


def strided(x: Tensor, wide: Sequence[int]) -> Tensor:
    """The same values in memory with gaps after each dimension."""
    gaps = x.new_zeros([n * w for n, w in zip(x.shape, wide, strict=True)])
    view = gaps[tuple(slice(0, None, w) for w in wide)]
    return view.copy_(x)


def set_one(rng: random.Random, x: Tensor, value: float) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    if x.numel():
        x.view(-1)[rng.randrange(x.numel())] = value
    return x


def number_of(rng: random.Random) -> int:
    return rng.choice([-(2**31), -7, -1, 0, 1, 2, 3, 5, 9, 100, 2**31 - 1])


ANY: list[Change] = [
    lambda rng, x: x.to(
        rng.choice([torch.float32, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool])
    ),
    lambda rng, x: x.to("meta"),
    lambda rng, x: x.unsqueeze(rng.randrange(x.dim() + 1)),
    lambda rng, x: x.flatten(),
    lambda rng, x: x.transpose(0, -1),
    lambda rng, x: x.narrow(d := rng.randrange(x.dim()), 0, rng.randrange(x.shape[d] + 1)) if x.dim() else x,
    lambda rng, x: strided(x.float(), [rng.choice([1, 1, 2]) for _ in x.shape]).to(x.dtype) if x.dim() else x,
    lambda rng, x: x.narrow(0, 0, 1).expand(x.shape) if x.dim() and x.shape[0] else x,
    lambda rng, x: x.flip(0) if x.dim() else x,
    lambda rng, x: torch.cat([x, x]) if x.dim() else x,
    lambda rng, x: rng.choice(
        [None, 3, "x", x.tolist() if x.numel() < 99 and x.device.type == "cpu" else (), 1.5, True]
    ),
    lambda rng, x: x.to_sparse() if x.dim() and x.element_size() > 1 else x,
]
FLOATS: list[Change] = [
    lambda rng, x: set_one(rng, x, rng.choice([torch.nan, torch.inf, -torch.inf, 0.0, 1e4])),
    lambda rng, x: x.clone().requires_grad_() if x.element_size() > 1 else x,
    lambda rng, x: torch._neg_view(-x) if x.element_size() > 1 else x,
    lambda rng, x: torch.zeros_like(x),
]
INTEGERS: list[Change] = [
    lambda rng, x: set_one(rng, x, number_of(rng)),
    lambda rng, x: set_one(rng, x, number_of(rng)),
    lambda rng, x: torch.full_like(x, number_of(rng)),
    lambda rng, x: x + rng.choice([-2, -1, 1, 3]),
    lambda rng, x: x.sort().values if x.dim() and x.layout is torch.strided else x,
    lambda rng, x: x.zero_(),
]
NUMBERS = [-1, 0, 1, 2, 7, 2**31, 2**70, 0.5, -0.5, 1e-12, 1e6, torch.nan, torch.inf, -torch.inf, "x", True, None]


def sizes(rng: random.Random) -> Sizes:
    tokens = rng.choice([0, 1, 2, 5, 9, 17])
    kv_heads = rng.choice([1, 1, 2])
    return Sizes(
        batch=rng.choice([1, 1, 2, 3]),
        tokens=tokens,
        selected=rng.randint(0, tokens),
        hidden=rng.choice([1, 2, 5, 8]),
        heads=kv_heads * rng.choice([1, 2, 3]),
        kv_heads=kv_heads,
        head_dim=rng.choice([2, 4, 6]),
        dtype=rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    )


def changed(rng: random.Random, call: Call) -> Call:
    """The call with up to three of its arguments changed."""
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        places = [*range(len(call.args)), *call.options]
        if not places:
            break
        place = rng.choice(places)
        value = call.args[place] if isinstance(place, int) else call.options[place]
        if isinstance(value, Tensor):
            if value.layout is not torch.strided:
                continue
            kind = FLOATS if value.is_floating_point() else INTEGERS
            new = rng.choice(rng.choice([ANY, kind, kind]))(rng, value)
        else:
            new = rng.choice(NUMBERS)
        args = tuple(new if i == place else a for i, a in enumerate(call.args))
        call = Call(call.op, args, {n: new if n == place else v for n, v in call.options.items()})
    return call


def words(call: Call) -> set[str]:
    """Names that an error may begin with: those of the arguments, and what is said of several together."""
    return {*inspect.signature(getattr(ok, call.op)).parameters, "neither"}


def assert_ours(error: BaseException, call: Call) -> None:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    assert frame is not None
    where = frame.tb_frame.f_code.co_filename
    line = linecache.getline(where, frame.tb_lineno).strip()
    assert where.startswith(PACKAGE), f"{call.op} ended in {type(error).__name__} of {where}: {error}"
    assert line.startswith("raise "), f"{call.op} ended in {line!r}: {type(error).__name__}: {error}"
    named = {word.strip("`'\",.:;()[]0123456789") for word in str(error).replace("[", " ").replace("=", " ").split()}
    assert named & words(call), f"{call.op} does not name an argument: {error}"


def is_comparable(call: Call) -> bool:
    """Real numbers on a CPU, of which the result is defined: no position twice in a scatter, no slot twice."""
    tensors = call.tensors().values()
    if any(x.device.type != "cpu" for x in tensors):
        return False
    if call.op in IN_PLACE:
        positions = call.args[IN_PLACE[call.op]]
        rows = positions.tolist() if positions.dim() == 2 else [positions.tolist()]
        return all(len({*(there := [p for p in row if p >= 0])}) == len(there) for row in rows)
    return True


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    got, expected = got.detach().double(), expected.detach().double()
    largest = float(torch.finfo(dtype).max)
    same = torch.where(expected.abs() > largest, expected.sign() * torch.inf, expected)
    fine = same.isfinite()
    assert got[fine].isfinite().all()
    torch.testing.assert_close(got[fine], same[fine], rtol=tolerance, atol=tolerance)


def assert_right(call: Call, result: Any, before: Call) -> None:
    """The result is what the statement says of the arguments as they were."""
    state = getattr(statements, call.op, None)  # of `rms_norm_select` there is none: it is two others
    expected = None if state is None else state(*before.args, **before.options)
    if call.op in IN_PLACE:
        for got, wanted in zip(call.written(), flat(expected), strict=True):
            assert_close(got, wanted, got.dtype)
    elif call.op == "select_tokens":
        assert_selects(result, expected)
    elif call.op == "rms_norm_select":
        only = {n: v for n, v in before.options.items() if n not in ("sink", "workspace", "norm", "score")}
        args = before.args[3:]
        assert_selects(result, statements.select_tokens(result.scores.detach(), *args, **only))
        assert_scored(result, before)
    elif call.op == "rms_norm_score":
        assert_scored(result, before)
    else:
        got = result if isinstance(result, Tensor) else result[0]
        wanted = expected if isinstance(expected, Tensor) else expected[0]
        if "attention" in call.op:
            got = but_for_lost_rows(got, wanted, before)
        assert_close(got, wanted, got.dtype)
        if call.op == "gather_add_rms_norm":
            held = (wanted.abs() <= torch.finfo(got.dtype).max).all(-1)  # past its range there is no norm
            assert_close(result[1][held], expected[1][held], got.dtype)


def but_for_lost_rows(got: Tensor, wanted: Tensor, call: Call) -> Tensor:
    """``got``, with ``wanted`` where a key that is not finite lets it be NaN: in any query of its row.

    Rows whose keys are finite must be right, and so must other rows' queries that do not see such a key, if not NaN.
    """
    lost = of_rows_in_which(lambda k, v: not (k.isfinite().all() and v.isfinite().all()), got, call)
    return torch.where(lost & got.isnan(), wanted.to(got.dtype), got)


def of_rows_in_which(holds: Callable[[Tensor, Tensor], bool], like: Tensor, call: Call) -> Tensor:
    """True for all queries of the rows or sequences of whose keys and values ``holds`` is true."""
    found = torch.zeros(like.shape, dtype=torch.bool)
    k, v = (x.detach().float() for x in call.args[1:3])
    if call.op == "sparse_query_attention":
        for b in range(found.shape[0]):
            found[b] = holds(k[b], v[b])
        return found
    ends = call.args[4].tolist()
    for s, own in enumerate(pairwise(ends)):
        if own[0] == own[1]:
            continue  # without a query, what says where its keys are may be anything
        if call.op == "sparse_query_attention_varlen":
            there: Any = slice(*call.args[5].tolist()[s : s + 2])
        else:
            rows = call.options.get("table_rows")
            row = s if rows is None else int(rows[s])
            pages = -(-int(call.args[6][s]) // k.shape[1])
            there = call.args[5][row, :pages].long()
            there = there[(there >= 0) & (there < k.shape[0])]  # before the window, pages may be any
        found[slice(*own)] = holds(k[there], v[there])
    return found


def assert_scored(result: Any, before: Call) -> None:
    options = {n: v for n, v in before.options.items() if n not in ("threshold", "workspace")}
    normed, scores = statements.rms_norm_score(*before.args[:3], **options)
    dtype = before.args[0].dtype
    if result.normed is not None:
        assert_close(result.normed, normed, dtype)
    if (normed.abs() > torch.finfo(dtype).max).any():
        return  # nor are the scores of states that the dtype does not hold
    size = 1 + normed.nan_to_num(0, 0, 0).abs().max().item() ** 2 * normed.shape[-1] if normed.numel() else 1
    assert_close(result.scores / size, scores / size, dtype)


def assert_selects(result: Any, expected: list[list[int]]) -> None:
    assert result.counts.tolist() == [len(row) for row in expected]
    if result.rows is None:
        for got, wanted in zip(result.positions.tolist(), expected, strict=True):
            assert got == wanted + [-1] * (len(got) - len(wanted))
    else:
        every = [p for row in expected for p in row]
        assert result.positions.tolist() == every + [-1] * (result.positions.shape[0] - len(every))


def copied(call: Call) -> Call:
    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.device.type != "cpu" or x.layout is not torch.strided:
            return x
        return x.detach().resolve_neg().clone()

    return Call(call.op, tuple(map(copy, call.args)), {n: copy(v) for n, v in call.options.items()})


def tried(seed: int) -> str:
    """One call at random: "accepted" or "refused"."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    made = calls(Numbers(seed=seed), sizes(rng))
    call = changed(rng, made[rng.choice(sorted(made))])
    return outcome(call, rng.choice(["auto", "auto", "auto", "torch", "torch", "no such", None]))


def outcome(call: Call, backend: Any) -> str:
    """The call, which is right, or refused as it must be."""
    before = copied(call)
    try:
        result = call(backend=backend)
    except ERRORS as error:
        assert_ours(error, call)
        for x, y in zip(call.args[: IN_PLACE.get(call.op, 0)], before.args, strict=False):
            if isinstance(x, Tensor) and y is not x:
                assert torch.equal(x.detach().nan_to_num(), y.nan_to_num()), "half of it is written"
        return "refused"
    assert backend in ("auto", "torch", "reference")
    if is_comparable(call):
        assert_right(call, result, before)
    else:
        assert all(x.device.type in ("cpu", "meta") for x in flat(result))
    return "accepted"


def try_many(seeds: Sequence[int]) -> None:
    outcomes = []
    for seed in seeds:
        try:
            outcomes.append(tried(seed))
        except BaseException as error:
            error.add_note(f"of seed {seed}")
            raise
    share = outcomes.count("accepted") / len(outcomes)
    assert 0.2 < share < 0.8, f"{share:.0%} accepted: the changes are too wild, or too tame"


def test_thirty_calls_at_random() -> None:
    try_many(range(30))


SIZES = Sizes(batch=2, tokens=9, selected=5, hidden=8, heads=2, kv_heads=1, head_dim=4)
# A key or a value of the first row that is not finite: which one, where it is (an index of the positions), and options.
NOT_FINITE: dict[str, tuple[str, int, float, dict[str, Any]]] = {
    "a value that only the last query sees": ("v", -1, torch.nan, {}),
    "a key that only the last query sees": ("k", -1, torch.inf, {}),
    "a key that later queries have behind their window": ("k", 0, torch.nan, {"window": 2}),
    "a value that later queries have behind their window": ("v", 0, -torch.inf, {"window": 2}),
    "an infinite key under a softcap": ("k", -1, torch.inf, {"softcap": 5.0}),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_stays_where_it_is_seen(name: str, backend: str) -> None:
    """Queries that see it are anything; in other rows, and in this one where they are numbers, the others are right."""
    which, place, value, options = NOT_FINITE[name]
    q, k, v, positions = calls(Numbers(seed=0), SIZES)["sparse_query_attention"].args
    at = int(positions[0, place])
    {"k": k, "v": v}[which][0, 0, at, 1] = value
    sees = (positions[0] >= at) & (positions[0] - at < options.get("window", SIZES.tokens))
    assert sees.any()
    assert not sees.all(), "some query of the row does not see it"
    assert outcome(Call("sparse_query_attention", (q, k, v, positions), options), backend) == "accepted"


@pytest.mark.parametrize("op", ["select_tokens", "rms_norm_select"])
@pytest.mark.parametrize("past", [0, 1])
def test_positions_end_where_int32_does(op: str, past: int) -> None:
    call = calls(Numbers(seed=0), SIZES)[f"{op}, packed"]
    offsets = torch.tensor([0, 2**31 - SIZES.tokens + past], dtype=torch.int32)
    given = Call(call.op, call.args, call.options | {"position_offsets": offsets})
    assert outcome(given, "auto") == ("refused" if past else "accepted")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 5000, 500))
def test_many_calls_at_random(first: int) -> None:
    try_many(range(first, first + 500))
