"""rms_norm_score of packed sequences: the same bits as each sequence alone; results in given memory; errors."""

import pytest
import torch
from torch import Tensor

from orthorank_kernels import rms_norm_score
from orthorank_kernels.ops.norm_score import NormScore
from tests.orthorank_kernels.ops.test_scoring_options import BACKENDS, EPS, int32, random
from tests.orthorank_kernels.tools import DEVICE, set_settings

OP = torch.ops.orthorank_kernels


def ends_of(lengths: list[int]) -> Tensor:
    return int32(0, *torch.tensor(lengths).cumsum(0).tolist())


@pytest.mark.parametrize("enough", [2048, 20, 5], ids=["1 token", "3 tokens", "12 tokens"])
@pytest.mark.parametrize("stored", [False, True], ids=["first token", "stored sink"])
def test_a_sequence_alone_has_the_same_bits(stored, enough, monkeypatch, poisoned):
    lengths = [7, 0, 1, 1, 0, 0, 30, 2, 23]
    set_settings(monkeypatch, "rms_norm_score", enough_programs=enough)
    x, added = (random(sum(lengths), 40, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    weight, sinks = random(40, dtype=torch.bfloat16, seed=2), random(len(lengths), 40, seed=3)
    packed = rms_norm_score(
        x,
        weight,
        EPS,
        residual=added,
        sink=sinks if stored else None,
        cu_seqlens=ends_of(lengths),
        backend="triton",
    )
    first = 0
    for i, n in enumerate(lengths):
        own = slice(first, first + n)
        sink = sinks[i : i + 1] if stored else None
        alone = rms_norm_score(x[own][None], weight, EPS, residual=added[own][None], sink=sink, backend="triton")
        for name, one, row in zip(NormScore._fields, packed, alone, strict=True):
            assert torch.equal(one[own], row[0]), f"{name} of sequence {i}"
        first += n


@pytest.mark.parametrize("enough", [2048, 40])
def test_more_sequences_than_one_load_counts(enough, monkeypatch, poisoned):
    lengths = [(7 * i) % 3 for i in range(600)]
    set_settings(monkeypatch, "rms_norm_score", enough_programs=enough)
    lengths = lengths if enough == 40 else lengths[:300]
    x, ends = random(sum(lengths), 4), ends_of(lengths)
    sinks = random(len(lengths), 4, seed=1)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(DEVICE)
    scores = rms_norm_score(x, None, EPS, norm="identity", sink=sinks, cu_seqlens=ends, backend="triton").scores
    torch.testing.assert_close(scores, (x * sinks[sequence]).sum(-1).abs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sink_for_all_sequences(backend, poisoned):
    x, sink, ends = random(9, 12), random(12, seed=1), int32(0, 2, 2, 9)
    scores = rms_norm_score(x, None, EPS, sink=sink, cu_seqlens=ends, backend=backend).scores
    repeated = rms_norm_score(x, None, EPS, sink=sink.repeat(3, 1), cu_seqlens=ends, backend="triton").scores
    torch.testing.assert_close(scores, repeated)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend, poisoned):
    x, added = random(18, 32)[::2, 8:24], random(9, 20, seed=1)[:, 2:18]
    sinks, ends = random(3, 20, seed=2)[:, 1:17], int32(0, 2, 2, 9)
    actual = rms_norm_score(x, None, EPS, residual=added, sink=sinks, cu_seqlens=ends, backend=backend)
    expected = rms_norm_score(
        x.contiguous(), None, EPS, residual=added.clone(), sink=sinks.clone(), cu_seqlens=ends, backend="torch"
    )
    for one, other in zip(actual, expected, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("ends", [(0,), (0, 0), (0, 0, 0)])
def test_no_tokens(ends, backend):
    normed, scores, copied = rms_norm_score(
        random(0, 8), None, EPS, cu_seqlens=int32(*ends), copy_input=True, backend=backend
    )
    assert list(normed.shape) == list(copied.shape) == [0, 8]
    assert list(scores.shape) == [0]
    assert scores.dtype == torch.float32


def test_tokens_of_no_sequence_are_left_alone():
    """A captured graph has more tokens than its sequences."""
    x = random(9, 8)
    out = NormScore(torch.full((9, 8), 5.0, device=DEVICE), torch.full((9,), 5.0, device=DEVICE), None)
    rms_norm_score(x, None, EPS, cu_seqlens=int32(0, 2, 6), out=out, backend="triton")
    expected = rms_norm_score(x[:6], None, EPS, cu_seqlens=int32(0, 2, 6), backend="triton")
    assert torch.equal(out.normed[:6], expected.normed)
    assert torch.equal(out.scores[:6], expected.scores)
    assert (out.normed[6:] == 5).all()
    assert (out.scores[6:] == 5).all()


OUTPUTS = [
    ({}, (True, True, False)),
    ({"copy_input": True}, (True, True, True)),
    ({"write_norm": False}, (False, True, False)),
    ({"norm": "identity", "copy_input": True}, (False, True, True)),
]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("options", "written"), OUTPUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_results_in_given_memory(packed, options, written, backend, poisoned):
    x = random(6, 16) if packed else random(2, 3, 16)
    options = {**options, "cu_seqlens": int32(0, 2, 6)} if packed else options
    shapes = (x.shape, x.shape[:-1], x.shape)
    out = tuple(
        torch.full(s, torch.nan, device=DEVICE) if wanted else None for s, wanted in zip(shapes, written, strict=True)
    )
    result = rms_norm_score(x, None, EPS, **options, out=out, backend=backend)
    expected = rms_norm_score(x, None, EPS, **options, backend="torch" if backend == "auto" else backend)
    for name, given, one, other in zip(NormScore._fields, out, result, expected, strict=True):
        assert given is None or one is given, name
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


def test_operator_passes_opcheck():
    x, weight = random(6, 16, dtype=torch.bfloat16), random(16, dtype=torch.bfloat16, seed=1)
    ends, sinks = int32(0, 2, 6), random(2, 16)
    layer = (x, weight, EPS, x * 2, "layer", weight, 1.0, "cosine", sinks, None, ends, True, False)
    alone = (x, None, EPS, None, "identity", None, 0.0, "inner", sinks, None, ends, True, True)
    torch.library.opcheck(OP.rms_norm_score.default, layer)
    torch.library.opcheck(OP.rms_norm_score.default, alone)
    out = {"normed": torch.empty_like(x), "scores": torch.empty(6), "summed": torch.empty_like(x)}
    torch.library.opcheck(OP.rms_norm_score_out.default, layer, out)
    out["normed"] = None
    torch.library.opcheck(OP.rms_norm_score_out.default, alone, out)


def test_compiles_as_one_graph():
    def layer(x, residual, weight, sinks, ends):
        result = rms_norm_score(x, weight, EPS, residual=residual, weight_offset=1.0, sink=sinks, cu_seqlens=ends)
        return result.normed * 2, result.scores + 1, result.residual

    weight, sinks = random(16, seed=1), random(2, 16, seed=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 7):
        x, ends = random(tokens, 16), int32(0, 4, tokens)
        for one, other in zip(compiled(x, x, weight, sinks, ends), layer(x, x, weight, sinks, ends), strict=True):
            torch.testing.assert_close(one, other)


X, PACKED, W = torch.ones(2, 3, 4), torch.ones(6, 4), torch.ones(4)
ENDS = torch.tensor([0, 2, 6], dtype=torch.int32)
IN_PACKED = {"hidden_states": PACKED, "cu_seqlens": ENDS}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_states": PACKED}, ValueError, ["hidden_states", "[6, 4]", "[batch, tokens, hidden]"]),
        ({"cu_seqlens": ENDS}, ValueError, ["hidden_states", "[2, 3, 4]", "[total, hidden]"]),
        ({**IN_PACKED, "cu_seqlens": ENDS.long()}, TypeError, ["cu_seqlens", "int64", "int32"]),
        ({**IN_PACKED, "cu_seqlens": ENDS[:1]}, ValueError, ["cu_seqlens", "[1]", "[sequences + 1]"]),
        ({**IN_PACKED, "cu_seqlens": ENDS.to("meta")}, ValueError, ["cu_seqlens", "meta", ".to(device)"]),
        ({**IN_PACKED, "cu_seqlens": ENDS.repeat(2)[::2]}, ValueError, ["cu_seqlens", "strides", ".contiguous()"]),
        ({**IN_PACKED, "starts": ENDS[:2]}, ValueError, ["starts", "cu_seqlens"]),
        ({**IN_PACKED, "lengths": ENDS[:2]}, ValueError, ["lengths", "cu_seqlens"]),
        ({**IN_PACKED, "sink": torch.ones(3, 4)}, ValueError, ["sink", "[3, 4]", "[2, 4]"]),
        ({"norm": "batch"}, ValueError, ["norm", "'batch'", "'layer'"]),
        ({"score": "angle"}, ValueError, ["score", "'angle'", "'cosine'"]),
        ({"bias": W}, ValueError, ["bias", "'rms'", '"layer"']),
        ({"norm": "identity"}, ValueError, ["weight", "'identity'"]),
        ({"norm": "layer", "bias": W[:3]}, ValueError, ["bias", "[3]", "[4]"]),
        ({"norm": "layer", "bias": W.half()}, TypeError, ["bias", "float16", "float32"]),
        ({"weight": None, "weight_offset": 1.0}, ValueError, ["weight_offset", "1.0"]),
        ({"residual": X[:1]}, ValueError, ["residual", "[1, 3, 4]", "[2, 3, 4]"]),
        ({"residual": X.half()}, TypeError, ["residual", "float16", "float32"]),
        ({"residual": torch.ones(2, 4, 3).mT}, ValueError, ["residual", "strides", ".contiguous()"]),
        ({"out": X}, TypeError, ["out", "Tensor", "(normed, scores, residual)"]),
        ({"out": (X, X[..., 0])}, TypeError, ["out", "tuple", "(normed, scores, residual)"]),
        ({"out": (X, X[..., 0].clone(), X)}, ValueError, ["out.residual", "None"]),
        ({"out": (None, X[..., 0].clone(), None)}, TypeError, ["out.normed", " is None; it must be"]),
        ({"out": (X, X[..., 0], None)}, ValueError, ["out.scores", "contiguous"]),
        ({"out": (X.half(), X[..., 0].clone(), None)}, TypeError, ["out.normed", "float16", "float32"]),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"hidden_states": X, "weight": W, "eps": EPS} | change
    with pytest.raises(error) as raised:
        rms_norm_score(**arguments)
    for word in words:
        assert word in str(raised.value)
