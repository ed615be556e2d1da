"""A prefill padded on the right to the length of a captured graph: right, and nothing in it waits for the device."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.calls import masks
from orthorank.stack.causal_attention import register_causal_attention
from tests.orthorank.launches import Launches
from tests.orthorank.models import BASE
from tests.orthorank.statement import assert_close
from tests.orthorank_kernels.fake_gpu import fake_gpus

BUCKET = 24
PLANS = {
    "topk": OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3),
    "multiple": OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3, keep_multiple=8),
    "removed": OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3, keep_ratios={2: 0}),
    "window": OrthoRankConfig(layers=[1, 2], keep_ratio=0.25, select="window", select_window=8),
    "threshold": OrthoRankConfig(layers=[1, 2], select="threshold", thresholds={1: 0.1, 2: 0.1}),
}


def prefill(model: Any, ids: torch.Tensor, bucket: int, **more: Any) -> Any:
    """The prompts ``ids`` ``[batch, tokens]``, padded to ``bucket`` tokens; logits of their last tokens."""
    tokens = ids.shape[1]
    padded = torch.nn.functional.pad(ids, (0, bucket - tokens))
    mask = (torch.arange(bucket, device=ids.device) < tokens).long().expand(ids.shape[0], -1)
    return model(padded, attention_mask=mask, logits_to_keep=torch.tensor([tokens - 1], device=ids.device), **more)


@torch.no_grad()
@pytest.mark.parametrize("plan", list(PLANS))
def test_a_padded_prompt_is_the_prompt_and_goes_on(tiny_model: Any, plan: str) -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 17), generator=torch.Generator().manual_seed(5))
    with apply(model, PLANS[plan]):
        expected = model(ids)
        model.set_attn_implementation(register_causal_attention(right_padded=True))
        found = prefill(model, ids, BUCKET, use_cache=True)
        assert_close(found.logits, expected.logits[:, -1:])
        cache = copy.deepcopy(found.past_key_values)  # the graph writes into its own at every replay
        cache.crop(17 - BUCKET)
        following = model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 18)).logits
        model.set_attn_implementation("sdpa")
        assert_close(following, model(ids[:, :1], past_key_values=expected.past_key_values).logits)


@torch.no_grad()
def test_padding_elsewhere_is_refused_by_name(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), torch.arange(3, 15)[None]
    model.set_attn_implementation(register_causal_attention(right_padded=True))
    for where in (slice(0, 3), slice(4, 6)):
        mask = torch.ones_like(ids)
        mask[:, where] = 0
        with pytest.raises(OrthoRankError, match="has padding before tokens, and the attention 'sdpa_causal_right_pad"):
            model(ids, attention_mask=mask)
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(OrthoRankError, match="has padding in the cache of the call"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.nn.functional.pad(mask, (0, 1)))


@torch.no_grad()
@pytest.mark.parametrize("plan", [name for name in PLANS if name != "threshold"])
def test_on_fake_gpus_a_captured_prefill_reads_nothing(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to be captured may not be asked for a number; a fake tensor has none to give."""
    from transformers import LlamaConfig, LlamaForCausalLM

    pytest.importorskip("triton")
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(True) or True)
    # A PyTorch without CUDA refuses this to a fake CUDA tensor.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    config = LlamaConfig(**BASE, attn_implementation=register_causal_attention(right_padded=True))
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with fake_gpus() as gpus, torch.device("cuda:0"):
        for module in model.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty(value.shape, dtype=value.dtype)))
            for name, value in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype))
        handle = apply(model, PLANS[plan])
        ids, mask = torch.empty(2, BUCKET).long(), torch.empty(2, BUCKET).long()
        with Launches(gpus) as traced:
            states = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        assert states.shape == (2, BUCKET, BASE["hidden_size"])
    assert all(layer.ran for layer in handle.layers)
    assert asked
    selecting = len(PLANS[plan].selecting)
    assert traced.names.count("sparse_query_attention") == selecting


@pytest.mark.parametrize("capturing", [False, True])
def test_a_tensor_answers_unless_it_is_captured(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    on_gpu: Any = SimpleNamespace(is_meta=False, is_cuda=True)
    assert masks._answers(on_gpu) is not capturing


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("plan", list(PLANS))
def test_a_captured_prefill_serves_prompts_of_any_length(plan: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**BASE, attn_implementation=register_causal_attention(right_padded=True))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).cuda().eval()
    apply(model, PLANS[plan])
    ids, mask = torch.zeros(1, BUCKET).long().cuda(), torch.ones(1, BUCKET).long().cuda()
    last = torch.zeros(1).long().cuda()

    def run() -> Any:
        return model(ids, attention_mask=mask, logits_to_keep=last, use_cache=False).logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()
    for tokens in (24, 17, 9):
        prompt = torch.randint(3, 128, (1, tokens)).cuda()
        ids.zero_()[:, :tokens] = prompt
        mask.zero_()[:, :tokens] = 1
        last.fill_(tokens - 1)
        graph.replay()
        assert_close(logits, model(prompt, use_cache=False).logits[:, -1:], relative=1e-3)
