"""Models as fixtures: tiny random ones, one of them in a folder, and SmolLM2 once per worker."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthorank.config import OrthoRankConfig
from tests.orthorank.models import plain

FAMILIES = ("llama", "mistral", "qwen2")


@pytest.fixture(autouse=True)
def _transformers_is_quiet() -> Iterator[None]:
    """No progress bars among what a test captures; what it changes of transformers' logging is put back."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.disable_progress_bar()


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """`plain`: ``tiny_model("llama", sliding_window=8)``."""
    return plain


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family in turn."""
    return request.param


@pytest.fixture(params=["plain", "corrected"])
def plan(request: pytest.FixtureRequest) -> OrthoRankConfig:
    """Layers 1 and 2 at a third, with maps for what they leave out and without."""
    from tests.orthorank.hf.test_corrected import maps

    made = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
    return made if request.param == "plain" else dataclasses.replace(made, correction=maps([1, 2]))


@pytest.fixture(scope="session")
def smollm2() -> Iterator[tuple[Any, Any]]:
    """SmolLM2-135M-Instruct, ``(model, tokenizer)``, fp32 on the CPU. Leave it as it was: others use it, too."""
    from orthorank.models import load_model

    model, tokenizer, _ = load_model(device="cpu", dtype="float32")
    forwards = [layer.forward for layer in model.model.layers]
    yield model, tokenizer
    assert [layer.forward for layer in model.model.layers] == forwards, "a test left a plan on the shared model"


@pytest.fixture(scope="session")
def harness() -> Iterator[None]:
    """lm-evaluation-harness, whose thousands of task files are read once: each time takes ten seconds."""
    from lm_eval import tasks
    from lm_eval.tasks._index import TaskIndex

    build, own = TaskIndex.build, Path(tasks.__file__).parent
    index = build([own])

    def build_others(paths: Iterable[Path]) -> dict[str, Any]:
        given = list(paths)
        return ({**index} if own in given else {}) | build([path for path in given if path != own])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build_others))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of 6 layers with a tokenizer of bytes, saved as transformers does. It has no sink."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("tiny-llama")
    logging.disable_progress_bar()
    plain("llama", vocab_size=256, num_hidden_layers=6).save_pretrained(folder)
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
