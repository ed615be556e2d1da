"""What Gluon calls differently in different versions of Triton, in one place; and what it takes from our own code."""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma

from orthorank_kernels.triton import attention_tiles

# The newer name first: where it is there, the older one raises when it is compiled.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# The same source as in the other attention kernel: it only computes with what it is given.
tile_rows = gluon.jit(attention_tiles.tile_rows.fn)
