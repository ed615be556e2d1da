"""One decoder layer of a model with random weights: dense as transformers runs it, and with a third of the tokens."""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.campaign.measure import Context
from orthorank import OrthoRankConfig
from orthorank.calls.context import ForwardContext
from orthorank.families.known import family_of
from orthorank.families.parts import Parts
from orthorank.hf.layer import selected_forward
from orthorank.hf.selection import prepared
from orthorank.speed.random_weights import random_model

KEEP_RATIO = 1 / 3
INDEX = 1
CLOSE = 0.02  # of the norm: bfloat16, and products whose rows are added in another order


@dataclass
class Layer:
    """The layer, one input, and what it takes."""

    model: Any
    hidden: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]
    call: ForwardContext
    plan: OrthoRankConfig

    def dense(self) -> torch.Tensor:
        result = self.model.model.layers[INDEX](self.hidden, attention_mask=None, position_embeddings=self.tables)
        return result[0] if isinstance(result, tuple) else result

    def selected(self) -> torch.Tensor:
        parts = Parts.of(family_of(self.model), self.model.model.layers[INDEX])
        return selected_forward(parts, INDEX, self.plan, self.call, self.hidden, self.tables)

    def check_selected(self, result: torch.Tensor) -> None:
        """Selected tokens have the dense layer's output, the others their input, and as many as should are selected."""
        changed = (result != self.hidden).any(-1)
        most = self.call.counts(self.plan.ratio(INDEX))[1]
        selected = changed.sum(-1)
        assert (selected <= most).all(), f"{selected.tolist()} tokens were updated, {most} were to be"
        assert (selected >= 0.99 * most).all(), f"{selected.tolist()} tokens were updated, {most} were to be"
        near(result[changed], self.dense()[changed])

    def check_dense(self, result: torch.Tensor) -> None:
        assert torch.isfinite(result).all(), "the dense layer gives values that are not finite"


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """As near as two ways of the same products in bfloat16 are."""
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    assert error < CLOSE, f"the distance to the dense layer's output is {error:.2%} of its norm"


def made(context: Context, config: str) -> Any:
    """A model of two layers: the second one is measured."""
    return random_model(config, device=context.machine.device, dtype=context.machine.dtype, layers=INDEX + 1)


def layer(context: Context, model: Any, batch: int, tokens: int) -> Layer:
    """The layer with a random input."""
    machine, plan = context.machine, OrthoRankConfig(layers=[INDEX], keep_ratio=KEEP_RATIO)
    generator = torch.Generator(machine.device).manual_seed(0)
    shape = (batch, tokens, model.config.hidden_size)
    hidden = torch.randn(shape, generator=generator, device=machine.device, dtype=machine.dtype)
    tables = model.model.rotary_emb(hidden, torch.arange(tokens, device=machine.device)[None])
    call = prepared(ForwardContext(batch, tokens, past=0, prompt_tokens=tokens), plan, machine.device)
    return Layer(model, hidden, tables, call, plan)
