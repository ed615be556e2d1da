"""The backend of SDPA that dense layers take: forced, so that every line can name it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.campaign.measure import Context

# cuDNN is what PyTorch takes by itself on an H100; the next one where the one before cannot run.
PREFERRED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


@contextmanager
def one_backend(context: Context, among: Sequence[SDPBackend] = PREFERRED) -> Iterator[str]:
    """Inside, SDPA runs the first backend of ``among`` that can run here, and no other; gives its name."""
    q, k = (
        torch.ones(1, heads, 64, 64, device=context.machine.device, dtype=context.machine.dtype) for heads in (4, 2)
    )
    for backend in among:
        try:
            with sdpa_kernel(backend):
                result = scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
            assert torch.isfinite(result).all()
        except (RuntimeError, AssertionError) as error:
            context.lines.write(kind="note", what=f"SDPA {backend.name} is not taken", note=str(error)[-300:])
            continue
        with sdpa_kernel(backend):
            yield backend.name
        return
    raise RuntimeError(f"none of {', '.join(backend.name for backend in among)} runs here")
