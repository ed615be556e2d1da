"""The windows that something is fitted to: what they must be, and what a plan says of them."""

import hashlib
from typing import TYPE_CHECKING, Any

from torch import Tensor

from orthorank.common.errors import OrthoRankError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_windows(model: "PreTrainedModel", input_ids: Tensor, least: int = 1) -> None:
    """``model`` is in eval mode, and ``input_ids`` are ``least`` windows of 2 tokens or more.

    Raises:
        OrthoRankError: they are not.
    """
    if model.training:
        raise OrthoRankError("model is in training mode; call model.eval() first")
    if input_ids.dim() != 2 or input_ids.shape[0] < least or input_ids.shape[1] < 2:
        windows = "one window" if least == 1 else f"{least} windows"
        raise OrthoRankError(
            f"input_ids has shape {list(input_ids.shape)}; it must be [windows, tokens] with at least {windows} of 2 "
            "tokens"
        )


def record_of(input_ids: Tensor) -> dict[str, Any]:
    """What a plan says of the windows it was calibrated on: how many of how many tokens, and their hash."""
    return {
        "ids_sha256": hashlib.sha256(input_ids.cpu().numpy().astype("<i8").tobytes()).hexdigest(),
        "windows": input_ids.shape[0],
        "seq_len": input_ids.shape[1],
    }
