"""What commands that let a model answer have in common: the prompt's BOS, greedy decoding, and rows that are kept."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import from_json
from orthorank.common.texts import Bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def with_bos(ids: list[int], tokenizer: "PreTrainedTokenizerBase", bos: str) -> list[int]:
    """A prompt's tokens with BOS as asked for.

    Args:
        bos: ``"auto"``: as tokenizer and template have it; ``"first"`` and ``"every"``: before every prompt;
            ``"none"``: before none.

    Raises:
        OrthoRankError: BOS is asked for and the tokenizer has none.
    """
    token = Bos.of(bos, tokenizer).token
    begins = token is not None and ids[:1] == [token]
    if bos == "none":
        return ids[1:] if begins else ids
    if bos == "auto" or begins:
        return ids
    if token is None:
        raise OrthoRankError(f"bos is {bos!r} and the tokenizer has no BOS token; it may be auto or none")
    return [token, *ids]


@torch.inference_mode()
def greedy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ids: Tensor, max_new_tokens: int, **settings: Any
) -> Tensor:
    """The tokens int64 ``[answer]`` with which ``model``, with whatever plan is applied to it, goes on after ``ids``.

    Args:
        ids: int64 ``[1, tokens]`` on the model's device. settings: further arguments of ``generate()``.
    """
    pad = tokenizer.pad_token_id
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
        **settings,
    )
    return generated[0, ids.shape[1] :]


def kept_rows(path: Path, what: str = "answers", **fields: type) -> dict[str, dict[str, Any]]:
    """Rows that an earlier run kept, by their key. A last line without its end, of a killed process, is cut off.

    Args:
        path: a file of `keep`; there need be none. what: it is a file of, in the error's words.
        fields: what each row has beside its key, and of which type.

    Raises:
        OrthoRankError: it cannot be read, or holds something else.
    """
    if not path.exists():
        return {}
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
    except OSError as error:
        raise OrthoRankError(f"{path} cannot be read: {error.strerror}") from error
    known = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = from_json(line.decode("utf-8"))
            known[row["key"]] = row
            if not all(isinstance(row[name], kind) for name, kind in fields.items()):
                raise ValueError("a row has a field of another type")
        except (ValueError, KeyError, TypeError) as error:
            raise OrthoRankError(
                f"{path} is no file of {what} (line {number}); delete it, or name another output folder"
            ) from error
    return known


def keep(path: Path, row: dict[str, Any]) -> None:
    """Add ``row``, which has a ``key``, to the JSONL file ``path``."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
    except OSError as error:
        raise OrthoRankError(f"{path} cannot be written: {error.strerror}") from error
