"""rms_norm_select: the two ops in one launch, bit for bit, in any order of execution."""

from functools import partial

import pytest
import torch
import triton

from orthorank_kernels import rms_norm_score, rms_norm_select, select_tokens
from orthorank_kernels.dispatch import BackendError, interpreting
from orthorank_kernels.layout import selection_workspace
from orthorank_kernels.ops.norm_selection import NormSelection
from orthorank_kernels.triton import norm_selection as kernels
from orthorank_kernels.triton import radix, score_keys
from orthorank_kernels.triton import scoring as scoring_kernels
from tests.orthorank_kernels.selections import BACKENDS, bounds, float32, int32, random, shuffled
from tests.orthorank_kernels.tools import DEVICE, DTYPES, set_settings

EPS = 1e-5
OF_THE_NORM = ("residual", "norm", "bias", "weight_offset", "score", "sink", "write_norm", "copy_input")
OF_BOTH = ("starts", "lengths", "cu_seqlens")
LENGTHS = [0, 5, 1, 0, 0, 17, 3, 0]


def one_after_the_other(x, weight, k=None, *, backend, **options):
    of_the_norm = {name: options.pop(name) for name in OF_THE_NORM if name in options}
    of_both = {name: options[name] for name in OF_BOTH if name in options}
    norm_score = rms_norm_score(x, weight, EPS, **of_the_norm, **of_both, backend=backend)
    return NormSelection(*norm_score, *select_tokens(norm_score.scores, k, **options, backend=backend))


def assert_same_bits(actual, expected) -> None:
    assert isinstance(actual, NormSelection)
    for name, one, other in zip(NormSelection._fields, actual, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype, name
            assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(1, torch.float32), (2, torch.float16), *((31, d) for d in DTYPES), (127, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_two_ops(backend, tokens, dtype, poisoned):
    x, weight = random(2, tokens, 24, dtype=dtype), random(24, dtype=dtype, seed=1)
    k = tokens // 3
    actual = rms_norm_select(x, weight, EPS, k, backend=backend)
    assert_same_bits(actual, one_after_the_other(x, weight, k, backend=backend))


@pytest.mark.parametrize("k", [0, 1, 11, 12])
def test_every_k_through_the_operator(k, poisoned):
    x, weight = random(1, 12, 8), random(8, seed=1)
    assert_same_bits(rms_norm_select(x, weight, EPS, k), one_after_the_other(x, weight, k, backend="torch"))
    actual = rms_norm_select(x, weight, EPS, k, backend="triton")
    assert_same_bits(actual, one_after_the_other(x, weight, k, backend="triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_sinks_and_k_of_each_row(backend, poisoned):
    x, weight = random(4, 16, 16, dtype=torch.bfloat16), random(16, dtype=torch.bfloat16, seed=1)
    selection = {
        "starts": int32(0, 5, 0, 16),
        "lengths": int32(16, 11, 11, 0),
        "sink_positions": int32(-1, 5, 3, -1),
        "keep_last": 2,
        "max_selected": 12,
    }
    k = torch.tensor([7, 3, 50, 4], device=DEVICE)
    for sink in (None, random(4, 16, dtype=torch.bfloat16, seed=2), random(16, seed=3)):
        actual = rms_norm_select(x, weight, EPS, k, sink=sink, backend=backend, **selection)
        assert_same_bits(actual, one_after_the_other(x, weight, k, sink=sink, backend=backend, **selection))
        assert actual.counts.tolist() == [7, 3, 11, 0]


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of more than 16 tokens are streamed, and programs take several tokens."""
    set_settings(monkeypatch, "rms_norm_select", {"short rows": {"tokens": 16}}, tokens=4)  # for each of 4 warps
    set_settings(monkeypatch, "rms_norm_score", enough_programs=8)


@pytest.fixture
def counted(monkeypatch):
    """Of each launch, whether its programs count the scores."""
    seen, launch = [], kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda *args, **options: (seen.append(options["BINNED"]), launch(*args, **options))[1]
    )
    return seen


def assert_long_rows_are_selected(room: int, *requests: tuple[dict, dict]) -> None:
    """Ties, zeros, NaN, infinities, and scores of all magnitudes."""
    scores = torch.randn(2, 33, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-20, 13)
    scores[0, 5:28:3], scores[1, ::4], scores[0, 29], scores[1, 9] = 1.5, 0.0, torch.nan, torch.inf
    x = torch.stack([scores, torch.zeros(2, 33)], -1).to(DEVICE)
    for request, rows in requests:
        workspace = torch.zeros(room, dtype=torch.int32, device=DEVICE)
        options = {"norm": "identity", "sink": float32(1, 0), "write_norm": False, "workspace": workspace, **rows}
        actual = rms_norm_select(x, None, EPS, **request, **options, max_selected=30, backend="triton")
        assert not workspace.any()
        expected = select_tokens(actual.scores, **request, **rows, max_selected=30, backend="torch")
        assert actual.positions.tolist() == expected.positions.tolist()
        assert actual.counts.tolist() == expected.counts.tolist()


PADDED = {"starts": int32(0, 6), "lengths": int32(33, 22), "keep_last": 3, "sink_positions": int32(20, -1)}
LONG = ({"k": 15}, {}), ({"k": int32(0, 22)}, PADDED)


def test_long_rows_are_streamed(small_tiles, poisoned, counted):
    """Where the workspace has no room to count scores, or a threshold needs none."""
    assert_long_rows_are_selected(2, ({"k": 15}, PADDED), ({"threshold": 1.5}, {}))
    assert counted == [False, False]


def test_long_rows_whose_scores_were_counted(small_tiles, poisoned, counted):
    assert_long_rows_are_selected(selection_workspace(2, 10**4, DEVICE).shape[0], *LONG)
    assert counted == [True, True]


def test_room_to_count_is_made_for_the_rows_that_are_counted(monkeypatch):
    """The same tokens with the default settings, whether the op makes the workspace or `selection_workspace` does."""
    counted = []
    monkeypatch.setattr(kernels, "launch", lambda *_, **options: counted.append(options["BINNED"]))
    for tokens in (2045, 2046):
        x = torch.zeros(2, tokens, 2, device=DEVICE)
        for workspace in (None, selection_workspace(2, tokens, torch.device(DEVICE))):
            rms_norm_select(x, torch.ones(2, device=DEVICE), EPS, 3, workspace=workspace, backend="triton")
    assert counted == [False, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("equal", [1000, 1100], ids=["in one bin", "more than a bin may hold"])
def test_many_equal_scores_of_a_long_row(equal, counted):
    """With the kernel's own constants, so also where it is compiled."""
    tokens, k = 2600, 700
    scores = torch.linspace(2, 3, tokens)
    scores[torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[:equal]] = 1.0
    x = torch.stack([scores, torch.zeros(tokens)], -1)[None].to(DEVICE)
    workspace = selection_workspace(1, tokens, torch.device(DEVICE))
    options = {"norm": "identity", "sink": float32(1, 0), "write_norm": False, "workspace": workspace}
    actual = rms_norm_select(x, None, EPS, k, **options, backend="triton")
    assert counted == [True]
    assert not workspace.any()
    expected = select_tokens(actual.scores, k, backend="torch")
    assert torch.equal(actual.positions, expected.positions)


@pytest.mark.skipif(not interpreting(), reason="a compiled kernel has its constants")
def test_a_bin_that_holds_more_than_there_are_bins(small_tiles, poisoned, counted, monkeypatch):
    for module in (kernels, radix, score_keys):
        monkeypatch.setattr(module, "SCORES", triton.language.constexpr(8))
    monkeypatch.setattr(kernels, "SCORE_BINS", 8)
    monkeypatch.setattr(score_keys, "FIRST_BIN", triton.language.constexpr(0))  # all are in the last
    assert_long_rows_are_selected(2 + 2 * 8, *LONG)
    assert counted == [True, True]


@pytest.mark.parametrize("request_", [{"k": 2}, {"k": int32(3, 0, 2, 1, 0, 9, -1, 4)}, {"threshold": 1.5}], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, [26], [0, 9, 0, 0, 0, 0, 0, 17]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend, lengths, request_, small_tiles, poisoned):
    """Each on its own, with its own sink; programs that take several tokens finish several sequences."""
    if isinstance(request_.get("k"), torch.Tensor):
        request_ = {"k": request_["k"][: len(lengths)]}
    x, weight = random(26, 24, dtype=torch.float16), random(24, dtype=torch.float16, seed=1)
    options = {"cu_seqlens": bounds(lengths), "keep_last": 1, "max_selected": 13, "backend": backend, **request_}
    for sink in (None, random(24, seed=2), random(len(lengths), 24, seed=3)):
        actual = rms_norm_select(x, weight, EPS, sink=sink, **options)
        assert_same_bits(actual, one_after_the_other(x, weight, sink=sink, **options))
    later = options | {"position_offsets": int32(*range(len(lengths))), "sink_positions": int32(*[-1] * len(lengths))}
    actual = rms_norm_select(x, weight, EPS, sink=random(24, seed=2), **later)
    assert_same_bits(actual, one_after_the_other(x, weight, sink=random(24, seed=2), **later))
    with pytest.raises(ValueError, match="position_offsets was given without sink"):
        rms_norm_select(x, weight, EPS, **later)


@pytest.mark.parametrize("request_", [{"k": 2}, {"threshold": 0.5}], ids=str)
@pytest.mark.parametrize("layout", ["batch", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_options_of_the_norm(backend, layout, request_, poisoned):
    x, weight = random(2, 13, 24, dtype=torch.bfloat16), random(24, dtype=torch.bfloat16, seed=1)
    added, rows = random(2, 13, 24, dtype=torch.bfloat16, seed=2), {}
    if layout == "packed":
        x, added, rows = x.flatten(0, 1), added.flatten(0, 1), {"cu_seqlens": bounds([20, 6])}
    for options in (
        {"residual": added, "weight_offset": 1.0, "write_norm": False},
        {"norm": "layer", "bias": weight, "score": "cosine", "copy_input": True},
        {"residual": added, "norm": "identity"},
        {"norm": "identity", "write_norm": False},
    ):
        given = {"weight": None} if options.get("norm") == "identity" else {"weight": weight}
        actual = rms_norm_select(x, eps=EPS, **given, **options, **request_, **rows, backend=backend)
        expected = one_after_the_other(x, **given, **options, **request_, **rows, backend=backend)
        assert_same_bits(actual, expected)


@pytest.mark.skipif(not interpreting(), reason="only the interpreter lets a test choose the order of programs")
@pytest.mark.parametrize("which", ["batch", "batch by threshold", "packed", "packed by threshold"])
@pytest.mark.parametrize(
    "order", [lambda n: list(range(n))[::-1], *(partial(shuffled, seed=s) for s in range(3))], ids=["reversed", *"abc"]
)
def test_any_order_of_programs_gives_the_same(order, which, monkeypatch, poisoned):
    from triton.runtime.interpreter import interpreter_builder

    x, weight, options = random(3, 9, 8), random(8, seed=1), {"k": 3}
    if "threshold" in which:
        options = {"threshold": 1.0}
    if "packed" in which:
        x, options["cu_seqlens"] = x.flatten(0, 1), bounds([0, 4, 1, 0, 1, 13, 8, 0])
        monkeypatch.setattr(
            kernels, "norm_arguments", lambda *a, **k: with_tokens_of_a_program(scoring_kernels.norm_arguments, 2, a, k)
        )
    expected = one_after_the_other(x, weight, **options, backend="triton")
    set_index = interpreter_builder.set_grid_idx
    visited = []

    def permuted(x, y, z):
        programs = order(interpreter_builder.grid_dim[0])
        visited.append(programs[x])
        set_index(programs[x], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", permuted)
    actual = rms_norm_select(x, weight, EPS, **options, backend="triton")
    assert sorted(visited) == list(range(14 if "packed" in which else 3 * 9))
    assert visited != sorted(visited)
    assert_same_bits(actual, expected)


def with_tokens_of_a_program(norm_arguments, tokens, args, kwargs):
    """What ``norm_arguments`` returns, for programs that take so many packed tokens each."""
    _, arguments = norm_arguments(*args, **kwargs)
    programs = -(-arguments["n_tokens"] // tokens)
    return programs, arguments | {"tokens_each": tokens, "n_blocks": programs}


@pytest.mark.parametrize("request_", [{"k": 3}, {"threshold": 0.5}], ids=str)
@pytest.mark.parametrize("rows", [{}, {"cu_seqlens": bounds(LENGTHS)}], ids=["batch", "packed"])
def test_one_workspace_serves_all_calls(rows, request_, poisoned):
    weight, workspace = random(8, seed=1), torch.zeros(12, dtype=torch.int32, device=DEVICE)
    for seed in range(3):
        x = random(26, 8, seed=seed) if rows else random(2, 13, 8, seed=seed)
        actual = rms_norm_select(x, weight, EPS, **request_, **rows, workspace=workspace, backend="triton")
        assert not workspace.any()
        assert_same_bits(actual, one_after_the_other(x, weight, **request_, **rows, backend="triton"))


@pytest.mark.parametrize("rows", [{}, {"cu_seqlens": bounds(LENGTHS)}], ids=["batch", "packed"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_out_is_written_and_returned(backend, rows):
    x, weight = random(26, 8) if rows else random(2, 13, 8), random(8, seed=1)
    for options in ({"k": 3}, {"threshold": 0.5, "copy_input": True, "write_norm": False}):
        expected = one_after_the_other(x, weight, **options, **rows, max_selected=9, backend="torch")
        out = NormSelection(*(None if t is None else torch.full_like(t, 77) for t in expected))
        actual = rms_norm_select(x, weight, EPS, **options, **rows, out=out, backend=backend)
        assert all(one is other for one, other in zip(actual, out, strict=True))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_tokens_past_the_last_sequence_are_not_selected(backend):
    """As in a captured graph, whose buffers are larger than most batches."""
    x, sink, cu_seqlens = random(12, 8), random(8, seed=1), bounds([4, 0, 3])
    for request in ({"k": 3}, {"threshold": 9.0}):
        workspace = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        options = {"sink": sink, "cu_seqlens": cu_seqlens, "workspace": workspace, **request}
        actual = rms_norm_select(x, None, EPS, **options, backend=backend)
        expected = select_tokens(actual.scores[:7], **request, cu_seqlens=cu_seqlens, max_selected=12)
        for one, other in zip(actual[3:], expected, strict=True):
            assert torch.equal(one, other)
        assert not workspace.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend, poisoned):
    x, weight = random(9, 2, 48)[:, :, 8:24].transpose(0, 1), random(16, seed=1)
    actual = rms_norm_select(x, weight, EPS, 4, backend=backend)
    assert actual[0].is_contiguous()
    assert_same_bits(actual, one_after_the_other(x.contiguous(), weight, 4, backend=backend))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 0)])
def test_empty_inputs(batch, tokens, backend, poisoned):
    x = random(batch, tokens, 8)
    for request in ({"k": 0}, {"threshold": 1.0}):
        actual = rms_norm_select(x, random(8), EPS, **request, max_selected=3, backend=backend)
        assert list(actual.normed.shape) == [batch, tokens, 8]
        assert list(actual.scores.shape) == [batch, tokens]
        assert actual.positions.tolist() == [[-1, -1, -1]] * batch
        assert actual.counts.tolist() == [0] * batch
        cu_seqlens = bounds([0] * batch)
        packed = rms_norm_select(x[:, :0].flatten(0, 1), None, EPS, **request, cu_seqlens=cu_seqlens, backend=backend)
        assert packed.cu_selected.tolist() == [0] * (batch + 1)
        assert packed.counts.tolist() == [0] * batch


def test_an_input_that_requires_grad_takes_pytorch():
    x, weight = random(1, 6, 8).requires_grad_(), random(8, seed=1)
    result = rms_norm_select(x, weight, EPS, 2)
    (result.normed[0, result.positions[0].long()].sum() + result.scores.sum()).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with pytest.raises(BackendError, match="no backward"):
        rms_norm_select(x, weight, EPS, 2, backend="triton")


def test_operator_passes_opcheck():
    op = torch.ops.orthorank_kernels.rms_norm_select.default
    x, weight = random(2, 7, 8, dtype=torch.float16), random(8, dtype=torch.float16, seed=1)
    plain = (None, "rms", None, 0.0, "inner", None, True, False)
    torch.library.opcheck(op, (x, weight, EPS, *plain, 3, None, None, None, 3, *(None,) * 5, 0, None))
    k = torch.tensor([2, 9], device=DEVICE)
    rest = (5, int32(0, 1), int32(7, 2), int32(-1, 1), None, None, 1, None)
    options = (x, "layer", weight, 1.0, "cosine", random(2, 8), False, False)
    torch.library.opcheck(op, (x, weight, EPS, *options, 7, k, None, None, *rest))
    rest = (5, None, None, int32(-1, 1), int32(0, 3, 7), int32(4, 0), 1, int32(0, 0))
    torch.library.opcheck(op, (x[0], weight, EPS, *plain, None, None, None, float32(1.0, 2.0), *rest))


def test_operator_with_out_passes_opcheck():
    op = torch.ops.orthorank_kernels.rms_norm_select_out.default
    x, weight = random(2, 7, 8), random(8, seed=1)
    plain = (None, "rms", None, 0.0, "inner", None, True, False)
    out = {"normed": torch.empty_like(x), "scores": random(2, 7), "summed": None}
    out |= {"positions": torch.ones(2, 3).int(), "counts": int32(0, 0), "rows": None, "cu_selected": None}
    torch.library.opcheck(op, (x, weight, EPS, *plain, 3, None, None, None, 3, *(None,) * 5, 0, None), out)


def test_compiles_as_one_graph():
    def layer(x, weight, lengths, cu_seqlens):
        batch = rms_norm_select(x, weight, EPS, x.shape[1] // 3, lengths=lengths, keep_last=1)
        packed = rms_norm_select(x[0], weight, EPS, threshold=1.0, cu_seqlens=cu_seqlens, residual=x[1])
        return batch, packed

    weight, lengths, cu_seqlens = random(16, seed=1), int32(7, 5), int32(0, 4, 9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 9):
        x = random(2, tokens, 16)
        for one, other in zip(
            compiled(x, weight, lengths, cu_seqlens), layer(x, weight, lengths, cu_seqlens), strict=True
        ):
            assert_same_bits(one, other)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_states": torch.ones(3, 4)}, ValueError, ["hidden_states", "[3, 4]"]),
        ({"weight": torch.ones(5)}, ValueError, ["weight", "[5]", "[4]"]),
        ({"k": 9}, ValueError, ["k is 9", "tokens, 3"]),
        ({"sink_positions": torch.ones(2)}, TypeError, ["sink_positions", "float32", "int32"]),
        ({"max_selected": -1}, ValueError, ["max_selected", "-1"]),
        ({"threshold": 1.0}, ValueError, ["k and threshold", "both"]),
        ({"norm": "batch"}, ValueError, ["norm", "'batch'", "'rms'"]),
        ({"workspace": torch.zeros(2)}, TypeError, ["workspace", "float32", "int32"]),
        ({"workspace": int32(0)}, ValueError, ["workspace", "[1]", "at least 2"]),
        ({"workspace": int32(0, 0, 0, 0)[::2]}, ValueError, ["workspace", "strides [2]"]),
        ({"out": (None,) * 4}, TypeError, ["out", "normed, scores, residual, positions"]),
        ({"out": (None,) * 7}, TypeError, ["out.positions", " is None; it must be"]),
        ({"out": (None, None, None, torch.ones(2, 1).int(), int32(0, 0), None, None)}, TypeError, ["out.normed"]),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"hidden_states": torch.ones(2, 3, 4), "weight": torch.ones(4), "eps": EPS, "k": 1} | change
    with pytest.raises(error) as raised:
        rms_norm_select(**arguments)
    for word in words:
        assert word in str(raised.value)
