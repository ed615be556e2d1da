"""What tells one model's weights from another's."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLED = 64  # elements of each weight that the model's fingerprint reads


def model_fingerprint(model: "PreTrainedModel") -> str:
    """A hash of the model's weights: names, shapes, dtypes and the first elements of each.

    It tells a model from its fine-tuned sister without reading gigabytes. Weights that are kept elsewhere (offloaded)
    count by name and shape alone.
    """
    import torch

    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            some = weight.detach().reshape(-1)[:_SAMPLED].to("cpu", torch.float32).contiguous()
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]
