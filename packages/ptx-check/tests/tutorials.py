"""The kernels of two of Triton's tutorials, fused softmax and matrix multiplication, written anew from what those pages
say that they do. `ptx_files/` has what Triton 3.9 makes of them:

    python packages/ptx-check/tests/tutorials.py     # writes it again; needs Triton and no GPU
"""

import json
import re
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FOLDER = Path(__file__).with_name("ptx_files")


@triton.jit
def softmax_kernel(out_ptr, x_ptr, stride_out, stride_x, n_rows, n_columns, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Softmax of each row, which a program reads once and keeps whole; it takes every so manyth row."""
    columns = tl.arange(0, BLOCK)
    inside = columns < n_columns
    for row in tl.range(tl.program_id(0), n_rows, tl.num_programs(0), num_stages=STAGES):
        x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=-float("inf"))
        powers = tl.exp(x - tl.max(x, axis=0))
        tl.store(out_ptr + row * stride_out + columns, powers / tl.sum(powers, axis=0), mask=inside)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, stride_a, stride_b, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c = leaky_relu(a @ b); tiles in groups of rows, so that programs that run together share more of b in the L2."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    within = tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m, tile_n = group * GROUP + within % height, within // height
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (rows % m)[:, None] * stride_a + inner[None, :]
    b_ptrs = b_ptr + inner[:, None] * stride_b + (columns % n)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(k, BLOCK_K)):
        left = k - step * BLOCK_K
        a = tl.load(a_ptrs, mask=inner[None, :] < left, other=0.0)
        b = tl.load(b_ptrs, mask=inner[:, None] < left, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_b
    acc = tl.where(acc >= 0, acc, 0.01 * acc)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c_ptr + rows[:, None] * stride_c + columns[None, :], acc.to(tl.float16), mask=inside)


SOFTMAX = {
    "out_ptr": "*fp32",
    "x_ptr": "*fp32",
    **dict.fromkeys(("stride_out", "stride_x", "n_rows", "n_columns"), "i32"),
}
MATMUL = {
    **dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*fp16"),
    **dict.fromkeys(("m", "n", "k", "stride_a", "stride_b", "stride_c"), "i32"),
}
TILE = {"BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 2}
# Name: kernel, types, constants, which arguments are multiples of 16, GPU.
KERNELS = {
    "softmax_sm80": (softmax_kernel, SOFTMAX, {"BLOCK": 256, "STAGES": 2}, (), 80),
    "matmul_sm80": (matmul_kernel, MATMUL, {"BLOCK_M": 32, **TILE}, (0, 1, 2, 4, 5, 6, 7, 8), 80),
    "matmul_sm90": (matmul_kernel, MATMUL, {"BLOCK_M": 64, **TILE}, (0, 1, 2, 4, 5, 6, 7, 8), 90),
}


def compiled(name: str) -> tuple[str, int]:
    """PTX without what it says of this machine, and the bytes of shared memory."""
    kernel, types, constants, multiples, gpu = KERNELS[name]
    source = ASTSource(
        kernel,
        {**types, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(at,): [["tt.divisibility", 16]] for at in multiples},
    )
    done = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": 4, "num_stages": 3})
    ptx = re.sub(r'"[^"]*?(/triton/language/[^"/]+|/[^"/]+)"', r'"\1"', done.asm["ptx"])
    return ptx.partition("\t.section\t")[0].rstrip() + "\n", done.metadata.shared


def main() -> None:
    for name in KERNELS:
        ptx, shared = compiled(name)
        (FOLDER / f"{name}.ptx").write_text(ptx, encoding="utf-8")
        (FOLDER / f"{name}.json").write_text(json.dumps({"shared": shared}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
