"""rms_norm_score: both backends against float64, Hugging Face's norm and plain definitions."""

import pytest
import torch

from orthorank_kernels import rms_norm_score
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.pytorch import scoring as pytorch
from tests.orthorank_kernels.tools import DEVICE, DTYPES, assert_within_budget, set_settings

BACKENDS = ("torch", "triton")
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "hidden"),
    [(2, 1, 576), (1, 63, 1), (1, 127, 100), (2, 17, 2048), (1, 3, 4096), (1, 2, 8192), (1, 2, 20000)],
)
def test_kernel_is_as_accurate_as_the_reference(batch, tokens, hidden, dtype, poisoned):
    x = random(batch, tokens, hidden, dtype=dtype) * 3
    weight, sink = random(hidden, dtype=dtype, seed=1), random(batch, hidden, dtype=dtype, seed=2)
    normed, scores, _ = rms_norm_score(x, weight, EPS, sink=sink, backend="triton")
    assert normed.dtype == dtype
    assert scores.dtype == torch.float32
    eager, eager_scores, _ = rms_norm_score(x, weight, EPS, sink=sink, backend="torch")
    exact, *_ = pytorch.rms_norm_score(x.double(), weight.double(), EPS, sink=sink.double())
    assert_within_budget(normed, eager, exact, dtype, "normed")
    # Scores are sums of the rounded values, so they are compared for the values that the kernel itself rounded.
    exact_scores = torch.einsum("bth,bh->bt", normed.double(), sink.double()).abs()
    eager_error = (torch.einsum("bth,bh->bt", eager.double(), sink.double()).abs() - eager_scores).abs().max()
    magnitude = torch.einsum("bth,bh->bt", normed.double().abs(), sink.double().abs())
    assert ((scores - exact_scores).abs() <= 2 * eager_error + 4 * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize(
    ("batch", "tokens", "enough"),
    [
        (1, 130, 8),
        (3, 43, 16),
        pytest.param(1, 1000, 2048, marks=pytest.mark.slow),
        pytest.param(1, 4097, 2048, marks=pytest.mark.slow),
    ],
)
def test_many_tokens_share_a_program(batch, tokens, enough, monkeypatch, poisoned):
    set_settings(monkeypatch, "rms_norm_score", enough_programs=enough)
    x, weight = random(batch, tokens, 8), random(8, seed=1)
    normed, scores, _ = rms_norm_score(x, weight, EPS, backend="triton")
    expected, expected_scores, _ = rms_norm_score(x, weight, EPS, backend="torch")
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(scores, expected_scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_that_of_hugging_face_bit_for_bit(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = llama.LlamaRMSNorm(576, eps=EPS).to(DEVICE, dtype)
    norm.weight.data = random(576, dtype=dtype)
    x = random(2, 65, 576, dtype=dtype, seed=1) * 10
    with torch.no_grad():
        assert torch.equal(rms_norm_score(x, norm.weight, EPS, backend="torch")[0], norm(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_inner_products_of_the_rounded_values(dtype, backend, poisoned):
    x, weight = random(3, 5, 40, dtype=dtype), random(40, dtype=dtype, seed=1)
    starts = int32(0, 2, 4)
    normed, scores, _ = rms_norm_score(x, weight, EPS, starts=starts, backend=backend)
    for row, start in enumerate(starts.tolist()):
        expected = (normed[row].float() @ normed[row, start].float()).abs()
        torch.testing.assert_close(scores[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stored_sink_gives_the_scores_of_the_first_token(backend, poisoned):
    x, weight = random(2, 6, 24), random(24, seed=1)
    normed, scores, _ = rms_norm_score(x, weight, EPS, backend=backend)
    for sink in (normed[:, 0], normed[:, 0].clone()):
        again = rms_norm_score(x[:, 2:], weight, EPS, sink=sink, backend=backend)
        assert torch.equal(again[0], normed[:, 2:])
        torch.testing.assert_close(again[1], scores[:, 2:], rtol=1e-5, atol=1e-5)
    shared = rms_norm_score(x, weight, EPS, sink=normed[0, 0], backend=backend)[1]
    torch.testing.assert_close(shared[1], (normed[1] @ normed[0, 0]).abs(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_sink_serves_half_precision(backend):
    x, weight = random(1, 4, 16, dtype=torch.bfloat16), random(16, dtype=torch.bfloat16, seed=1)
    sink = random(1, 16, seed=2)
    normed, scores, _ = rms_norm_score(x, weight, EPS, sink=sink, backend=backend)
    torch.testing.assert_close(scores[0], (normed[0].float() @ sink[0]).abs(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts_outside_the_row_are_cut_to_it(backend, poisoned):
    x, weight = random(2, 3, 8), random(8, seed=1)
    scores = rms_norm_score(x, weight, EPS, starts=int32(-5, 99), backend=backend)[1]
    expected = rms_norm_score(x, weight, EPS, starts=int32(0, 2), backend=backend)[1]
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend, poisoned):
    views = {
        "slice of a wider tensor": random(2, 6, 48)[..., 8:24],
        "tokens first": random(6, 2, 16).transpose(0, 1),
        "every second": random(4, 12, 16)[::2, ::2],
    }
    weight = random(32, seed=1)[3:19]
    sink = random(2, 40, seed=2)[:, 1:17]
    for name, x in views.items():
        normed, scores, _ = rms_norm_score(x, weight, EPS, sink=sink, backend=backend)
        expected = rms_norm_score(x.contiguous(), weight.clone(), EPS, sink=sink.contiguous(), backend="torch")
        assert normed.is_contiguous(), name
        torch.testing.assert_close(normed, expected[0], msg=name)
        torch.testing.assert_close(scores, expected[1], msg=name)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 0)])
def test_empty_inputs(batch, tokens, backend):
    normed, scores, _ = rms_norm_score(random(batch, tokens, 8), random(8), EPS, backend=backend)
    assert list(normed.shape) == [batch, tokens, 8]
    assert list(scores.shape) == [batch, tokens]
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_values_stay_in_their_token(backend):
    x = random(1, 4, 16)
    clean = rms_norm_score(x, torch.ones(16, device=DEVICE), EPS, backend=backend)
    x[0, 2, 3] = torch.nan
    normed, scores, _ = rms_norm_score(x, torch.ones(16, device=DEVICE), EPS, backend=backend)
    others = [0, 1, 3]
    assert torch.equal(normed[0, others], clean[0][0, others])
    assert torch.equal(scores[0, others], clean[1][0, others])
    assert scores[0, 2].isnan()


def test_gradients_flow_through_norm_and_score():
    x, weight, sink = (random(*s).double().requires_grad_() for s in ((2, 3, 5), (5,), (2, 5)))
    assert torch.autograd.gradcheck(lambda x, w, s: pytorch.rms_norm_score(x, w, EPS, sink=s)[:2], (x, weight, sink))
    assert torch.autograd.gradcheck(lambda x, w: pytorch.rms_norm_score(x, w, EPS, starts=int32(1, 0))[:2], (x, weight))


def test_an_input_that_requires_grad_takes_pytorch():
    x, weight = random(1, 4, 8).requires_grad_(), random(8, seed=1)
    rms_norm_score(x, weight, EPS)[1].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with pytest.raises(BackendError, match="no backward"):
        rms_norm_score(x, weight, EPS, backend="triton")
    with torch.no_grad():
        assert not rms_norm_score(x, weight, EPS)[0].requires_grad


@pytest.mark.parametrize("with_sink", [False, True])
def test_operator_passes_opcheck(with_sink):
    x, weight = random(2, 5, 16, dtype=torch.bfloat16), random(16, dtype=torch.bfloat16, seed=1)
    sink, starts = (random(2, 16), None) if with_sink else (None, int32(1, 0))
    extra = (None, "rms", None, 0.0, "inner", sink, starts, None, True, False)
    torch.library.opcheck(torch.ops.orthorank_kernels.rms_norm_score.default, (x, weight, EPS, *extra))
    transposed = random(5, 2, 16).transpose(0, 1)
    torch.library.opcheck(
        torch.ops.orthorank_kernels.rms_norm_score.default,
        (transposed, weight.float(), EPS, *extra),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_as_one_graph():
    def layer(x, weight, starts):
        normed, scores, _ = rms_norm_score(x, weight, EPS, starts=starts)
        return normed * 2, scores + 1

    x, weight, starts = random(2, 5, 16), random(16, seed=1), int32(1, 0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 4):
        torch.testing.assert_close(compiled(x[:, :tokens], weight, starts), layer(x[:, :tokens], weight, starts))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_states": None}, TypeError, ["hidden_states", " is None; it must be", "[batch, tokens, hidden]"]),
        ({"hidden_states": torch.ones(3, 4)}, ValueError, ["hidden_states", "[3, 4]", "[batch, tokens, hidden]"]),
        ({"hidden_states": torch.ones(2, 3, 4).double()}, TypeError, ["hidden_states", "float64", "bfloat16"]),
        ({"hidden_states": torch.ones(2, 4, 3).mT}, ValueError, ["hidden_states", "strides", ".contiguous()"]),
        ({"hidden_states": torch.ones(2, 3, 0)}, ValueError, ["hidden_states", "hidden size 0"]),
        ({"weight": torch.ones(5)}, ValueError, ["weight", "[5]", "[4]"]),
        ({"weight": torch.ones(4).half()}, TypeError, ["weight", "float16", "float32", ".to(dtype)"]),
        ({"sink": torch.ones(3, 4)}, ValueError, ["sink", "[3, 4]", "[2, 4]"]),
        ({"sink": torch.ones(5)}, ValueError, ["sink", "[5]", "[4]"]),
        ({"sink": torch.ones(2, 4).half()}, TypeError, ["sink", "float16", "float32"]),
        ({"sink": 3}, TypeError, ["sink", "int", "[batch, hidden]"]),
        ({"starts": torch.ones(2)}, TypeError, ["starts", "float32", "int32"]),
        ({"starts": torch.ones(3, dtype=torch.int32)}, ValueError, ["starts", "[3]", "[2]"]),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, TypeError, ["lengths", "int64", "int32"]),
        ({"sink": torch.ones(2, 4, device="meta")}, ValueError, ["sink", "meta", ".to(device)"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'", "'triton'"]),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"hidden_states": torch.ones(2, 3, 4), "weight": torch.ones(4), "eps": EPS} | change
    with pytest.raises(error) as raised:
        rms_norm_score(**arguments)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.gpu
@pytest.mark.huge
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_more_than_2_to_31_elements():
    tokens, hidden = 2**31 // 4096 + 3, 4096
    x = torch.zeros(1, tokens, hidden, dtype=torch.bfloat16, device="cuda")
    x[0, -1], x[0, 0] = 1, 1
    normed, scores, _ = rms_norm_score(x, torch.ones(hidden, dtype=torch.bfloat16, device="cuda"), EPS)
    assert (normed[0, -1] == 1).all()
    assert scores[0, -1] == hidden
    assert scores[0, 1:-1].abs().max() == 0
