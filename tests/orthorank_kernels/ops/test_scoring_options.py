"""rms_norm_score with every norm, score, layout and kind of sink, against float64 and PyTorch's own functions."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from orthorank_kernels import rms_norm_score
from orthorank_kernels.pytorch import scoring as pytorch
from tests.orthorank_kernels.tools import DEVICE, DTYPES, assert_within_budget, set_settings

BACKENDS = ("torch", "triton")
EPS = 1e-5
HIDDEN = 72
FLAGS: dict[str, dict[str, Any]] = {
    "rms": {"weight": True},
    "rms without weight": {},
    "rms, 1 + weight": {"weight": True, "weight_offset": 1.0},
    "layer": {"weight": True, "bias": True, "norm": "layer"},
    "layer without weight": {"norm": "layer"},
    "layer, 1 + weight": {"weight": True, "weight_offset": 1.0, "norm": "layer"},
    "identity": {"norm": "identity"},
}
LENGTHS = (3, 0, 0, 5, 1, 6)  # of the packed sequences
LAYOUTS = [  # and whose sink; where that is stored, one dtype is enough
    ("batch", "one for all", torch.bfloat16),
    ("batch", "each its own", torch.bfloat16),
    ("packed", "one for all", torch.bfloat16),
    ("packed", "each its own", torch.bfloat16),
    *(("padded", "first token", dtype) for dtype in DTYPES),
    *(("packed", "first token", dtype) for dtype in DTYPES),
]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclass
class Layout:
    """15 tokens in one of the layouts, and what a plain definition has to know about them."""

    shape: tuple[int, ...]
    options: dict[str, Tensor]
    sequence: list[int]  # of each token
    first: list[int]  # of each token: the first valid token of its sequence


def layout(name: str) -> Layout:
    if name == "packed":
        ends = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
        sequence = [i for i, n in enumerate(LENGTHS) for _ in range(n)]
        return Layout((15,), {"cu_seqlens": int32(*ends)}, sequence, [ends[s] for s in sequence])
    starts = (0, 2, 4) if name == "padded" else (0, 0, 0)
    sequence = [i // 5 for i in range(15)]
    return Layout((3, 5), {"starts": int32(*starts)}, sequence, [5 * s + starts[s] for s in sequence])


def plain_scores(score: str, normed: Tensor, sinks: Tensor) -> Tensor:
    """``[tokens]``, from ``[tokens, hidden]``, in float64."""
    products = (normed.double() * sinks.double()).sum(-1).abs()
    lengths = normed.double().norm(dim=-1) * sinks.double().norm(dim=-1)
    return products if score == "inner" else products / lengths


@pytest.mark.parametrize(("where", "whose", "dtype"), LAYOUTS, ids=str)
@pytest.mark.parametrize("norm", FLAGS)
def test_options_in_every_layout(norm, where, whose, dtype, monkeypatch, poisoned):
    set_settings(
        monkeypatch, "rms_norm_score", enough_programs=4
    )  # programs of several tokens, which several sequences share
    at = layout(where)
    x, added = (3 * random(*at.shape, HIDDEN, dtype=dtype, seed=s) for s in (0, 1))
    options = {**at.options, **FLAGS[norm]}
    weight = random(HIDDEN, dtype=dtype, seed=2) if options.pop("weight", False) else None
    bias = random(HIDDEN, dtype=dtype, seed=3) if options.pop("bias", False) else None
    sink = None
    if whose != "first token":
        sink = random(HIDDEN, seed=4) if whose == "one for all" else random(max(at.sequence) + 1, HIDDEN, seed=4)

    for residual, score in ((None, "inner"), (added, "cosine")):
        call = {**options, "residual": residual, "score": score, "sink": sink, "bias": bias}
        normed, scores, summed = rms_norm_score(x, weight, EPS, **call, backend="triton")
        eager = rms_norm_score(x, weight, EPS, **call, backend="torch")
        h = x if residual is None else x + residual
        assert (summed is None) == (residual is None)
        assert summed is None or torch.equal(summed, h)
        exact = in_float64(h, weight, bias, options)
        assert normed.dtype == dtype
        assert_within_budget(normed, eager.normed, exact, dtype, "normed")

        # Of the values that the kernel rounded, which are what a stored sink is compared with.
        values, others = normed.reshape(15, HIDDEN), eager.normed.reshape(15, HIDDEN)
        if sink is None:
            sinks, eager_sinks = values[at.first], others[at.first]
        else:
            sinks = eager_sinks = sink.expand(15, -1) if sink.dim() == 1 else sink[at.sequence]
        exact_scores = plain_scores(score, values, sinks)
        eager_error = (plain_scores(score, others, eager_sinks) - eager.scores.reshape(15)).abs().max()
        magnitude = plain_scores(score, values.abs(), sinks.abs())
        assert scores.shape == at.shape
        assert ((scores.reshape(15) - exact_scores).abs() <= 2 * eager_error + 8 * 2.0**-24 * magnitude).all()


def in_float64(h: Tensor, weight: Tensor | None, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The norm as its formula says it."""
    norm, h = options.get("norm", "rms"), h.double()
    if norm == "identity":
        return h
    if norm == "layer":
        h = h - h.mean(-1, keepdim=True)
    normed = h / (h.square().mean(-1, keepdim=True) + EPS).sqrt()
    if weight is not None:
        normed = normed * (options.get("weight_offset", 0.0) + weight.double())
    return normed if bias is None else normed + bias.double()


def gemma_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers 5's ``GemmaRMSNorm`` computes it."""
    output = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (output * (1.0 + weight.float())).type_as(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemma_rounds_once(dtype, poisoned):
    x, weight = 5 * random(4, 33, 256, dtype=dtype), random(256, dtype=dtype, seed=1)
    expected = gemma_rms_norm(x, weight)
    assert torch.equal(rms_norm_score(x, weight, EPS, weight_offset=1.0, backend="torch").normed, expected)
    normed = rms_norm_score(x, weight, EPS, weight_offset=1.0, backend="triton").normed
    # Sums in another order change the last bit of a value in some thousand, and no value by more.
    ulps = (normed.double() - expected.double()).abs() / (expected.double().abs() * torch.finfo(dtype).eps)
    if dtype == torch.float32:
        assert ulps.max() <= 4
    else:
        assert ulps.max() <= 1
        assert (normed != expected).double().mean() < 0.002
        twice_rounded = rms_norm_score(x, 1 + weight, EPS, backend="triton").normed
        assert (twice_rounded != expected).double().mean() > 0.05, "the rounding makes no difference here"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemma_is_that_of_hugging_face(dtype):
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    norm = gemma.GemmaRMSNorm(96, eps=EPS).to(DEVICE, dtype)
    norm.weight.data = random(96, dtype=dtype)
    x = random(2, 5, 96, dtype=dtype, seed=1) * 10
    with torch.no_grad():
        expected = norm(x)
        assert torch.equal(gemma_rms_norm(x, norm.weight), expected), "transformers has another formula now"
        actual = rms_norm_score(x, norm.weight, EPS, weight_offset=1.0, backend="torch").normed
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weighted", "biased"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("hidden", [1, 63, 577])
def test_layer_norm_is_pytorchs(hidden, weighted, biased, backend, poisoned):
    x = 2 * random(2, 7, hidden) + 30  # far from zero, where a one-pass variance fails
    weight = random(hidden, seed=1) if weighted else None
    bias = random(hidden, seed=2) if biased else None
    normed = rms_norm_score(x, weight, EPS, norm="layer", bias=bias, backend=backend).normed
    torch.testing.assert_close(normed, functional.layer_norm(x, (hidden,), weight, bias, EPS), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosine_is_pytorchs(dtype, backend, poisoned):
    x, weight = random(2, 9, 40, dtype=dtype), random(40, dtype=dtype, seed=1)
    sink = 7 * random(2, 40, seed=2)
    normed, scores, _ = rms_norm_score(x, weight, EPS, score="cosine", sink=sink, backend=backend)
    expected = functional.cosine_similarity(normed.float(), sink[:, None], dim=-1).abs()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    of_itself = rms_norm_score(x, weight, EPS, score="cosine", backend=backend).scores
    torch.testing.assert_close(of_itself[:, 0], torch.ones(2, device=DEVICE), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero", ["tokens", "sink"])
def test_cosine_with_nothing_is_zero(zero, backend):
    x, sink = random(1, 3, 8), random(8, seed=1)
    (x if zero == "tokens" else sink).zero_()
    scores = rms_norm_score(x, None, EPS, norm="identity", score="cosine", sink=sink, backend=backend).scores
    assert scores.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("residual", [False, True])
def test_identity_returns_what_is_there(residual, backend, poisoned):
    x, added = random(2, 5, 16, dtype=torch.bfloat16), random(2, 5, 16, dtype=torch.bfloat16, seed=1)
    result = rms_norm_score(x, None, EPS, norm="identity", residual=added if residual else None, backend=backend)
    assert result.normed is (result.residual if residual else x)
    expected = (x + added if residual else x).float()
    torch.testing.assert_close(result.scores, torch.einsum("bth,bh->bt", expected, expected[:, 0]).abs())


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_scores_alone_are_the_same_scores(backend, poisoned):
    x, weight = random(2, 5, 16), random(16, seed=1)
    both = rms_norm_score(x, weight, EPS, backend=backend)
    alone = rms_norm_score(x, weight, EPS, write_norm=False, backend=backend)
    assert alone.normed is None
    assert alone.residual is None
    assert torch.equal(alone.scores, both.scores)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("norm", ["rms", "identity"])
def test_a_copy_of_the_input(norm, backend, poisoned):
    x = random(2, 5, 32)[..., 8:24]
    normed, scores, copied = rms_norm_score(x, None, EPS, norm=norm, copy_input=True, backend=backend)
    assert torch.equal(copied, x)
    assert copied.is_contiguous()
    assert copied.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    expected = rms_norm_score(x, None, EPS, norm=norm, backend=backend)
    assert torch.equal(normed, expected.normed)
    assert torch.equal(scores, expected.scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_rounded_before_it_is_normed(backend, poisoned):
    x = torch.full((1, 3, 16), 256.0, dtype=torch.bfloat16, device=DEVICE)
    added = torch.full_like(x, 0.9)
    added[..., ::2] = 1.1  # near 256, bfloat16 has even numbers alone: the sums become 256 and 258
    normed, scores, summed = rms_norm_score(x, None, EPS, residual=added, backend=backend)
    assert torch.equal(summed, x + added)
    assert normed.unique().numel() == 2
    again = rms_norm_score(x + added, None, EPS, backend=backend)
    assert torch.equal(normed, again.normed)
    assert torch.equal(scores, again.scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_the_residual_are_honoured(backend, poisoned):
    x, added = random(2, 6, 16), random(6, 2, 48, seed=1)[..., 8:24].transpose(0, 1)
    result = rms_norm_score(x, None, EPS, residual=added, starts=int32(0, 3), backend=backend)
    expected = rms_norm_score(x, None, EPS, residual=added.contiguous(), starts=int32(0, 3), backend="torch")
    for actual, one in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, one)


def test_gradients_flow_through_every_option():
    x, added = (random(6, 5, seed=s).double().requires_grad_() for s in (0, 1))
    weight, bias, sink = (random(*shape, seed=2).double().requires_grad_() for shape in ((5,), (5,), (3, 5)))
    packed = {"score": "cosine", "cu_seqlens": int32(0, 4, 4, 6)}

    def layer(x, added, weight, bias, sink):
        return pytorch.rms_norm_score(x, weight, EPS, added, "layer", bias, 1.0, sink=sink, **packed)

    def gemma(x, weight):
        return pytorch.rms_norm_score(x, weight, EPS, weight_offset=1.0, copy_input=True, **packed)

    def identity(x, added):
        return pytorch.rms_norm_score(x, None, EPS, added, "identity", **packed)[1:]

    assert torch.autograd.gradcheck(layer, (x, added, weight, bias, sink))
    assert torch.autograd.gradcheck(gemma, (x, weight))
    assert torch.autograd.gradcheck(identity, (x, added))
