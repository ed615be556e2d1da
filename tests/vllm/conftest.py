"""What vLLM reads from the environment, said before it is imported; the checkpoints that are served."""

import os
import shutil
from pathlib import Path

import pytest

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where its scheduler can be looked at
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
EMBEDDING = "model.embed_tokens.weight"  # vLLM's CPU build packs matrices; tables stay as they are
DIFFERENT = {"llama": {}, "mistral": {"sliding_window": 48}, "qwen2": {}, "qwen3": {}}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of each model type, by its name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = {}
    for model_type, settings in DIFFERENT.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **(TINY | settings))
        folders[model_type] = tmp_path_factory.mktemp(model_type)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folders[model_type])
    return folders


@pytest.fixture(scope="session")
def llama(checkpoints: dict[str, Path]) -> Path:
    """The tiny Llama."""
    return checkpoints["llama"]


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny Llamas, and the first one with the second one's embedding. With embeddings tied to the output vLLM's CPU
    build keeps the old output when it reloads, with or without a plan.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    models = {}
    for seed, name in enumerate(("first", "second", "mixed")):
        torch.manual_seed(seed % 2)
        config = AutoConfig.for_model("llama", **(TINY | {"tie_word_embeddings": False}))
        models[name] = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    models["mixed"].load_state_dict(
        models["first"].state_dict() | {EMBEDDING: models["second"].state_dict()[EMBEDDING]}
    )
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def llama_with_words(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer, which beam search asks for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("words") / "llama"
    shutil.copytree(llama, folder)
    words = {f"<{number}>": number for number in range(TINY["vocab_size"])}  # type: ignore[call-overload]
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<1>", eos_token="<2>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder that vLLM loads."""
    import torch

    from orthorank.models import load_model

    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer, _ = load_model(None, "cpu", "float32")
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
