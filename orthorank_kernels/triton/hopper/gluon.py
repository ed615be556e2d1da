"""What Gluon calls differently in different versions of Triton, in one place; and what it takes from our own code."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from orthorank_kernels.triton import attention_step, attention_tiles

# The newer name first: where it is there, the older one raises when it is compiled.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# The same source as in the other attention kernel: it only computes with what it is given.
tile_rows = gluon.jit(attention_tiles.tile_rows.fn)
find_work = gluon.jit(attention_tiles.find_work.fn)
existing_page = gluon.jit(attention_step.existing_page.fn)
SEARCH = gl.constexpr(256)  # sequences that one step of the search reads


@gluon.jit
def find_sequence(cu_selected_ptr, n_seqs, n_queries, tile, QUERIES: gl.constexpr):
    """Sequence of a tile of packed queries, its first query and its end, and the tile's number in the sequence.

    Tiles belong to sequences as `attention_tiles.find_sequence` says, and here are in their order.
    """
    sequence = -1
    for first in range(0, n_seqs + 1, SEARCH):
        number = first + gl.arange(0, SEARCH, layout=gl.BlockedLayout([2], [32], [4], [0]))
        begins = gl.load(cu_selected_ptr + number, mask=number <= n_seqs, other=0)  # [SEARCH]
        sequence += gl.sum(((number <= n_seqs) & (begins // QUERIES + number <= tile)).to(gl.int32), 0)
    begin = gl.load(cu_selected_ptr + sequence)
    end = gl.load(cu_selected_ptr + sequence + 1, mask=sequence < n_seqs, other=n_queries)
    return sequence, begin, end, tile - (begin // QUERIES + sequence)


@gluon.jit
def page_of(values, key, there, PAGE_SIZE: gl.constexpr):
    """The page of a key, of which the table is read where ``there`` says so: like ``key``."""
    _v_ptr, table_ptr, n_pages, _stride_v_page = values
    return existing_page(gl.load(table_ptr + key // PAGE_SIZE, mask=there, other=0), n_pages).to(gl.int32)
