"""What goes on around the loading of a model: nothing is left to chance, silence, a GGUF file that is parsed once."""

import functools
import logging
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from orthorank.common.errors import OrthoRankError

NAMED = 8  # tensors that an error lists
# The Hub tells of its retries: their outcome is told in one sentence. Where torchao is installed, transformers imports
# it, and it lists the CUDA parts that a machine without GPU lacks.
NOISY = ("transformers", "huggingface_hub", "torchao", "torch.utils._pytree")
_IN_A_LAYER = re.compile(r"(.*\blayers\.)\d+\.")
_COMPUTED = ("rotary_emb.inv_freq", "masked_bias")  # old checkpoints have them; models compute them


class Complete:
    """A loader of transformers that takes whole checkpoints alone.

    transformers gives a tensor that it finds in no file, or in another shape, random values and goes on.

    Args:
        loader: a class with ``from_pretrained``, such as `transformers.AutoModelForCausalLM`.
        name: what errors call the model; None: what ``from_pretrained`` is given.
    """

    def __init__(self, loader: Any, name: str | None = None) -> None:
        self.loader, self.name = loader, name

    def from_pretrained(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As the loader's own.

        Raises:
            OrthoRankError: tensors of the model are in no file or have another shape there, or the files have tensors
                of layers that the model has not.
        """
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused here, with their names
        model, found = self.loader.from_pretrained(path, *args, **kwargs)
        check_complete(model, found, self.name or str(path))
        return model


def check_complete(model: Any, found: dict[str, Any], name: str) -> None:
    """``found``, what transformers says of loading ``model``, has nothing missing, mismatched or left over.

    Raises:
        OrthoRankError: naming the tensors.
    """
    remedy = "the files are incomplete, or config.json is that of another model: fetch or save the checkpoint again"
    if wrong := sorted(found["mismatched_keys"]):
        said = [f"{key} ({_by(there)} in the file, {_by(here)} in the model)" for key, there, here in wrong]
        raise OrthoRankError(
            f"model {name!r}: tensors have another shape than config.json says: {_some(said)}; {remedy}"
        )
    if missing := sorted(found["missing_keys"]):
        raise OrthoRankError(
            f"model {name!r}: tensors are in no file of the checkpoint and would be random: {_some(missing)}; {remedy}"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        return  # the scales of a format, which checks them itself
    own = {layer[1] for key in model.state_dict() if (layer := _IN_A_LAYER.match(key))}
    left = [key for key in found["unexpected_keys"] if (layer := _IN_A_LAYER.match(key)) and layer[1] in own]
    if left := sorted(key for key in left if not key.endswith(_COMPUTED)):
        raise OrthoRankError(
            f"model {name!r}: the files have tensors that the model's layers have no place for, so that it would "
            f"compute something else: {_some(left)}; {remedy}"
        )


def _some(names: Collection[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(list(names)[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' notices and progress bars; downloads keep theirs. Everything is put back afterwards."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with silent(*NOISY), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def silent(*loggers: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Inside, the loggers of these names say nothing below ``level``."""
    before = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in before:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, known in before.items():
            logger.setLevel(known)


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
