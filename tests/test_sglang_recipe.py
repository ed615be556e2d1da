"""The code in docs/sglang.md, run as it stands over tensors in SGLang's layouts, against the Hugging Face path."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, apply
from orthorank.packed.sinks import SinkBank
from tests.orthorank.models import plain

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sglang.md"
CONTEXT = 96
TOPK: dict[str, Any] = {"layers": [1, 2], "keep_ratio": 0.5}
WINDOW = TOPK | {"select": "window", "select_window": 8, "keep_ratios": {2: 0.25}}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    module = sys.modules["sglang_recipe"] = ModuleType("sglang_recipe")  # where dataclasses look for their module
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return plain("llama")


class Server:
    """What SGLang does around the layers: slots for tokens, steps of several requests, the dense layers."""

    def __init__(self, recipe: ModuleType, model: Any, plan: OrthoRankConfig, page_size: int) -> None:
        config = model.config
        self.recipe, self.model, self.plan, self.page_size = recipe, model, plan, page_size
        self.layers = [weights_of(recipe, layer, config) for layer in model.model.layers]
        slots = 8 * CONTEXT + page_size  # the first page is that of padding
        shape = (slots, config.num_key_value_heads, config.head_dim)
        self.buffers = [(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in self.layers]
        self.req_to_token = torch.full((8, CONTEXT), 10**6, dtype=torch.int32)
        free = torch.randperm(slots // page_size - 1, generator=torch.Generator().manual_seed(1)) + 1
        self.free = free.tolist()
        self.bank = SinkBank(self._states, capacity=4)

    def _states(self, token: int) -> torch.Tensor:
        embeddings = self.model.model.embed_tokens.weight.detach()
        return self.recipe.first_token_states(token, embeddings, self.layers, self.plan)

    def admit(self, request: int, tokens: int) -> None:
        """Slots for the first ``tokens`` of a request, page by page."""
        for begin in range(0, tokens, self.page_size):
            if self.req_to_token[request, begin] == 10**6:
                first = self.free.pop() * self.page_size
                for place in range(begin, min(begin + self.page_size, CONTEXT)):
                    self.req_to_token[request, place] = first + place - begin

    def step(self, parts: dict[int, tuple[list[int], int, int]]) -> torch.Tensor:
        """Logits ``[tokens, vocabulary]`` of new tokens.

        Args:
            parts: by request all its tokens, how many of them are cached, and how many are its prompt.
        """
        recipe, rows = self.recipe, list(parts)
        cached = [before for _, before, _ in parts.values()]
        ids = [token for tokens, before, _ in parts.values() for token in tokens[before:]]
        places = [place for tokens, before, _ in parts.values() for place in range(before, len(tokens))]
        for request, (tokens, _, _) in parts.items():
            self.admit(request, len(tokens))
        owner = [request for request, (tokens, before, _) in parts.items() for _ in tokens[before:]]
        positions = torch.tensor(places)
        cos, sin = self.model.model.rotary_emb(torch.zeros(1), positions[None])
        batch = recipe.Batch(
            extend_prefix_lens_cpu=cached,
            extend_seq_lens_cpu=[len(tokens) - before for tokens, before, _ in parts.values()],
            seq_lens=torch.tensor([len(tokens) for tokens, _, _ in parts.values()]),
            out_cache_loc=self.req_to_token[torch.tensor(owner), positions].long(),
            req_pool_indices=torch.tensor(rows),
            req_to_token=self.req_to_token,
            page_size=self.page_size,
            cos=cos[0],
            sin=sin[0],
            prompt_lens=[prompt for _, _, prompt in parts.values()],
            first_tokens=[tokens[0] for tokens, _, _ in parts.values()],
        )
        step = recipe.step_of(batch, self.plan, self.bank)
        hidden = self.model.model.embed_tokens(torch.tensor(ids))
        residual = torch.zeros_like(hidden)
        for index, w in enumerate(self.layers):
            if index in self.plan.selecting:
                states = self.bank.states[:, self.plan.selecting.index(index)]
                layer = recipe.Layer(w, *self.buffers[index], batch, states)
                hidden, residual = recipe.run_selected(index, layer, self.plan, step, hidden, residual)
            else:
                layer = recipe.Layer(w, *self.buffers[index], batch, None)
                hidden, residual = self._dense(layer, step, hidden, residual, positions)
        stream = self.model.model.norm(hidden + residual)
        return self.model.lm_head(stream)

    def _dense(self, layer: Any, step: Any, hidden: Any, residual: Any, positions: Any) -> Any:
        everything = self.recipe.PackedRows(
            torch.arange(step.tokens, dtype=torch.int32), positions.int(), step.cu_tokens
        )
        stream = hidden + residual
        normed = torch.nn.functional.rms_norm(stream, layer.w.input_norm.shape, layer.w.input_norm, layer.w.eps)
        layer.project(normed)
        stream = stream + layer.attend(normed, everything)
        fed = torch.nn.functional.rms_norm(stream, layer.w.pre_mlp_norm.shape, layer.w.pre_mlp_norm, layer.w.eps)
        return layer.feed_forward(fed), stream


def weights_of(recipe: ModuleType, layer: Any, config: Any) -> Any:
    attention, mlp = layer.self_attn, layer.mlp
    return recipe.Weights(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach(),
        o=attention.o_proj.weight.detach(),
        pre_mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach(),
        down=mlp.down_proj.weight.detach(),
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
    )


def prompt(length: int, seed: int, first: int = 1) -> list[int]:
    drawn = torch.randint(3, 128, (length - 1,), generator=torch.Generator().manual_seed(seed))
    return [first, *drawn.tolist()]


def expected(model: Any, plan: OrthoRankConfig | None, tokens: list[int]) -> torch.Tensor:
    """Logits of a prompt, by the Hugging Face path."""
    ids = torch.tensor([tokens])
    if plan is None:
        return model(ids).logits[0]
    with apply(model, plan) as handle, handle.prefilling():
        return model(ids).logits[0]


def generated(model: Any, plan: OrthoRankConfig, tokens: list[int], count: int) -> list[int]:
    with apply(model, plan):
        ids = model.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids[0, len(tokens) :].tolist()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("page_size", [1, 16])
@torch.no_grad()
def test_prompts_and_generated_tokens_in_one_batch(recipe: ModuleType, model: Any, page_size: int) -> None:
    plan = OrthoRankConfig(**TOPK)
    server = Server(recipe, model, plan, page_size)
    texts = {3: prompt(37, 1), 0: prompt(5, 2, first=9)}
    lengths = {request: len(tokens) for request, tokens in texts.items()}
    logits = server.step({request: (tokens, 0, len(tokens)) for request, tokens in texts.items()})
    for found, tokens in zip(logits.split(list(lengths.values())), texts.values(), strict=True):
        close(found, expected(model, plan, tokens))
        assert (found - expected(model, None, tokens)).abs().max() > 0.1, "the plan makes a difference"
    ends = [36, 41]
    late = prompt(23, 3)
    for turn in range(4):  # in the second of them another prompt comes
        for request, end in zip(texts, ends, strict=True):
            texts[request] = [*texts[request], int(logits[end].argmax())]
        parts = {request: (tokens, len(tokens) - 1, lengths[request]) for request, tokens in texts.items()}
        if turn == 1:
            logits = server.step(parts | {6: (late, 0, len(late))})
            close(logits[2:], expected(model, plan, late))
        else:
            logits = server.step(parts)
        ends = [0, 1]
    for request, tokens in texts.items():
        assert tokens[lengths[request] :] == generated(model, plan, tokens[: lengths[request]], 4)


@pytest.mark.parametrize("page_size", [1, 16])
@torch.no_grad()
def test_chunks_that_end_at_windows_are_one_prompt(recipe: ModuleType, model: Any, page_size: int) -> None:
    plan = OrthoRankConfig(**WINDOW)
    server = Server(recipe, model, plan, page_size)
    long, other = prompt(61, 4), prompt(30, 5)
    found = [server.step({1: (long[:24], 0, 61)})]
    both = server.step({1: (long[:40], 24, 61), 2: (other, 0, 30)})
    found += [both[:16], server.step({1: (long, 40, 61)})]
    close(torch.cat(found), expected(model, plan, long))
    close(both[16:], expected(model, plan, other))


@torch.no_grad()
def test_a_hit_of_a_cached_prefix(recipe: ModuleType, model: Any) -> None:
    """A second request takes the first 32 slots of the first one: four windows, none with a forced token."""
    plan = OrthoRankConfig(**WINDOW)
    server = Server(recipe, model, plan, 16)
    first = prompt(45, 6)
    server.step({0: (first, 0, 45)})
    second = first[:32] + prompt(20, 7)
    server.req_to_token[5, :32] = server.req_to_token[0, :32]
    close(server.step({5: (second, 32, 52)}), expected(model, plan, second)[32:])
