"""Models whose layers `accelerate` keeps elsewhere are searched as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank.families.known import device_of
from orthorank.search import Evaluator, greedy_search
from orthorank.stack.layers import LayerStack
from tests.orthorank.plain_search import LAYERS, random_windows, small_stack

PLACES = {
    "disk": ["model.layers.2", "model.layers.3", "model.layers.5", "model.norm", "lm_head"],
    "embedding on disk": ["model.embed_tokens", "model.layers.0", "model.layers.4"],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_stack(tie_word_embeddings=False).model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return random_windows()


def offloaded(saved: Path, on_disk: list[str], folder: Path) -> Any:
    """The saved model with some parts on disk and the others on the CPU."""
    from transformers import AutoModelForCausalLM

    parts = [f"model.layers.{index}" for index in range(LAYERS)]
    parts += ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = {part: "disk" if part in on_disk else "cpu" for part in parts}
    return AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=folder)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("keep_ratio", [0.0, 1 / 3])
@pytest.mark.parametrize("places", PLACES)
def test_offloaded_models(
    saved: Path, windows: Tensor, tmp_path: Path, places: str, keep_ratio: float, fast: bool
) -> None:
    from transformers import AutoModelForCausalLM

    model = offloaded(saved, PLACES[places], tmp_path)
    on_meta = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert any(name.startswith(PLACES[places][0]) for name in on_meta), "it is offloaded"
    whole = AutoModelForCausalLM.from_pretrained(saved)
    states = [
        greedy_search(Evaluator(LayerStack(each), windows, keep_ratio=keep_ratio), range(1, LAYERS - 1), 2, fast=fast)
        for each in (model, whole)
    ]
    assert states[0] == states[1], "the same bits"
    still = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert still == on_meta, "and offloaded again"


def test_where_input_belongs(saved: Path, tmp_path: Path) -> None:
    model = offloaded(saved, PLACES["embedding on disk"], tmp_path)
    assert next(model.parameters()).device.type == "meta"
    assert device_of(model) == device_of(model.model.layers[0]) == torch.device("cpu")
    assert device_of(torch.nn.Linear(2, 2)) == torch.device("cpu")


def test_states_follow_the_layers(windows: Tensor) -> None:
    """Where layers run on several devices, states go where the next layer is: seen on the meta device."""
    stack = small_stack()
    inputs = stack.embed(windows)
    stack.decoder.layers[3].to("meta")
    for ratio in (0.5, 1.0):
        moved = stack.run(3, inputs.hidden_states, inputs, ratio)
        assert moved.device.type == "meta"
        assert moved.shape == inputs.hidden_states.shape
