"""What goes on around the loading of a model: silence, and a GGUF file that is parsed once."""

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' notices and progress bars; downloads keep theirs. Everything is put back afterwards."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    level, hub_level = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    # Where torchao is installed, transformers imports it, and it lists the CUDA parts that a machine without GPU lacks.
    others = {logger: logger.level for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))}
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)  # its retries; the outcome is told in one sentence
    transformers_logging.disable_progress_bar()
    for logger in others:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        for logger, before in others.items():
            logger.setLevel(before)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Within the block a GGUF file is parsed once.

    transformers parses it for the config, the tokenizer and the weights (seconds each: a vocabulary is 10^5 small
    reads), and builds the name map of all layers anew for every module. Both depend on their arguments alone.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    swaps: list[tuple[Any, str, Any]] = [
        (gguf, name, functools.lru_cache(maxsize=1)(getattr(gguf, name)))
        for name in ("GGUFReader", "get_tensor_name_map")
        if hasattr(gguf, name)
    ]
    if hasattr(loader, "tqdm"):  # this one bar does not listen to transformers' switch
        swaps.append((loader, "tqdm", lambda items, **_: items))
    originals = [getattr(module, name) for module, name, _ in swaps]
    for module, name, replacement in swaps:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name, _), original in zip(swaps, originals, strict=True):
            setattr(module, name, original)
