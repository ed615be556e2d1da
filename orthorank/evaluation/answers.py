"""What all have in common that let a model answer: the prompt's BOS, and greedy decoding."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
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
