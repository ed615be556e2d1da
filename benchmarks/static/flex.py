"""FlexAttention's kernel for selected queries, from the template inside torch, without a GPU.

Inductor fills the template for a device that is present. Here it is filled with what Inductor would put there for
``flex_attention`` with a block mask whose ``mask_mod`` is ``key <= positions[batch, query]``: grouped heads, contiguous
[batch, heads, tokens, head_dim] tensors, and Inductor's own tile for the target.
"""

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.static.case import HALF, empty

POINTERS = ("Q", "K", "V", "LSE", "MAX", "KV_NUM_BLKS", "KV_IDX", "FULL_KV_NUM_BLKS", "FULL_KV_IDX", "POSITIONS", "OUT")
SIZES = {"Q": ("ZQ_", "HQ_", "QLEN_"), "K": ("ZQ_", "HKV_", "KLEN_"), "KV_NUM_BLKS": ("1", "1")}
HEADER = "import triton\nimport triton.language as tl\n\n\n"


def options(head_dim: int, group: int, target: str) -> tuple[dict[str, Any], int, int]:
    """The template's constants, and warps and stages, as Inductor chooses them; a length that blocks divide."""
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    heuristic = CUDAConfigHeuristic()
    tiles = heuristic.h100_default_flex_config if target == "sm_90" else heuristic.a100_default_flex_config
    tile = tiles[HALF, head_dim]
    constants = {
        "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "OUTPUT_LOGSUMEXP": False,
        "OUTPUT_MAX": False, "FLOAT32_PRECISION": "'ieee'", "IS_DIVISIBLE": True, "SM_SCALE": head_dim**-0.5,
        "GQA_SHARED_HEADS": group, "HAS_FULL_BLOCKS": True, "QK_HEAD_DIM": head_dim, "QK_HEAD_DIM_ROUNDED": head_dim,
        "V_HEAD_DIM": head_dim, "V_HEAD_DIM_ROUNDED": head_dim, "SAFE_HEAD_DIM": True, "USE_TMA": False,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SPARSE_Q_BLOCK_SIZE": 128, "SPARSE_KV_BLOCK_SIZE": 128,
        "INDEX_DTYPE": "tl.int32",
    }  # fmt: skip
    return constants, tile.num_warps, tile.num_stages


def source(constants: dict[str, Any]) -> str:
    """The filled template: Python source of a Triton kernel named ``kernel``."""
    from jinja2 import Environment, StrictUndefined
    from torch._inductor.kernel.flex.common import load_flex_template

    d = constants["QK_HEAD_DIM"]
    lengths = "ZQ_, HQ_, HKV_, QLEN_, KLEN_"
    defines = "\n".join(f"{name}: tl.constexpr = {value}" for name, value in constants.items())
    strides = {
        "Q": (f"HQ_ * QLEN_ * {d}", f"QLEN_ * {d}", str(d), "1"),
        "K": (f"HKV_ * KLEN_ * {d}", f"KLEN_ * {d}", str(d), "1"),
        "KV_NUM_BLKS": ("0", "0", "1"),
        "KV_IDX": ("0", "0", "KLEN_ // 128", "1"),
    }
    strides |= {"V": strides["K"], "FULL_KV_NUM_BLKS": strides["KV_NUM_BLKS"], "FULL_KV_IDX": strides["KV_IDX"]}

    def modification(subgraph_number: int, output_name: str, **names: Any) -> str:
        if subgraph_number == 0:
            return f"{output_name} = {names['score']}"
        return f"{output_name} = {names['n']} <= tl.load(arg_POSITIONS + {names['b']} * QLEN_ + {names['m']})"

    def store_output(indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        z, h, m, column = indices
        return f"tl.store(OUT + (({z} * HQ_ + {h}) * QLEN_ + {m}) * {d} + {column}, {value}, mask={mask})"

    def indented(text: str, levels: int) -> str:
        return text.replace("\n", "\n" + "    " * levels)

    environment = Environment(undefined=StrictUndefined)
    environment.filters["indent_except_first"] = indented
    text = "".join(load_flex_template(name) for name in ("flex_attention", "utilities", "common"))
    arguments = f"{', '.join(f'arg_{name}' for name in POINTERS)}, {lengths}"
    own_names = "\n".join(f"{name} = arg_{name}" for name in POINTERS)
    head = f"{defines}\n{own_names}"
    filled = environment.from_string(text).render(
        constants,
        def_kernel=lambda *_: f"@triton.jit\ndef kernel({arguments}):\n    {indented(head, 1)}\n",
        gen_argdefs=lambda: arguments,
        gen_defines=lambda: defines,
        size=lambda name, axis: SIZES[name][axis],
        stride=lambda name, axis=None: ", ".join(strides[name]) if axis is None else strides[name][axis],
        modification=modification,
        store_output=store_output,
    )
    return HEADER + filled


def module(text: str) -> ModuleType:
    """Imported from a file, because Triton reads the source of its kernels."""
    folder = Path(tempfile.mkdtemp(prefix="flex-"))
    path = folder / "flex_kernel.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("flex_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def launch(head_dim: int, group: int) -> None:
    """Launch it for the target of the worker that this process is."""
    from orthorank_kernels.triton import configs

    constants, warps, stages = options(head_dim, group, configs.target_of(torch.device("cuda", 0)))
    batch, kv_heads, queries, keys = 2, 8, 768, 2048
    q, k = empty(batch, kv_heads * group, queries, head_dim), empty(batch, kv_heads, keys, head_dim)
    blocks = [empty(n, dtype=torch.int32) for n in (queries // 128, queries // 128 * keys // 128) * 2]
    scalars = empty(batch * kv_heads * group * queries, dtype=torch.float32)
    positions = empty(batch, queries, dtype=torch.int32)
    kernel = module(source(constants)).kernel
    kernel[(queries // constants["BLOCK_M"], batch, kv_heads * group)](
        q, k, k, scalars, scalars, *blocks, positions, torch.empty_like(q), batch, kv_heads * group, kv_heads, queries,
        keys, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
