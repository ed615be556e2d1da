"""The gate of the MLP, in PyTorch: ``silu(gate) * up``, each step rounded to the dtype, as in Hugging Face's MLPs."""

from torch import Tensor
from torch.nn.functional import silu


def silu_and_mul(gate: Tensor, up: Tensor, positions: Tensor | None = None) -> Tensor:
    activated = silu(gate)
    # In place where no gradient needs the factors: on a CPU, new memory costs more than the product.
    product = activated * up if activated.requires_grad or up.requires_grad else activated.mul_(up)
    if positions is not None:
        product = product.masked_fill((positions < 0)[..., None], 0)
    return product.contiguous()
