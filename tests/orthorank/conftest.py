"""Models for the tests: tiny random ones of every family, and SmolLM2 once per worker."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FAMILIES = ("llama", "mistral", "qwen2")


def make_tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A seeded random causal LM, fp32, in eval mode: hidden 64, 4 layers, 4 heads, 2 key/value heads of 16."""
    import transformers

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # the default of 0.02 makes layers that hardly change their input
        "tie_word_embeddings": False,
    } | overrides
    config = getattr(transformers, f"{names[family]}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, f"{names[family]}ForCausalLM")(config).float().eval()


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """`make_tiny_model`: ``tiny_model("llama", sliding_window=8)``."""
    return make_tiny_model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family in turn."""
    return request.param


@pytest.fixture(scope="session")
def smollm2() -> Iterator[tuple[Any, Any]]:
    """SmolLM2-135M-Instruct, ``(model, tokenizer)``, fp32 on the CPU. Leave it as it was: others use it, too."""
    from orthorank.models import load_model

    model, tokenizer, _ = load_model(device="cpu", dtype="float32")
    forwards = [layer.forward for layer in model.model.layers]
    yield model, tokenizer
    assert [layer.forward for layer in model.model.layers] == forwards, "a test left a plan on the shared model"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of 6 layers with a tokenizer of bytes, saved as transformers does. It has no sink."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("tiny-llama")
    logging.disable_progress_bar()
    make_tiny_model("llama", vocab_size=256, num_hidden_layers=6).save_pretrained(folder)
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
