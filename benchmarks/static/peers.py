"""Kernels of others that do one of our jobs, compiled for the same GPUs: what our figures stand beside.

They come from the extra ``bench`` (see `make bench-install`); none of their code is here. A peer that is not installed
is a case with an error.
"""

import os
from typing import Any

import torch

from benchmarks.static.case import FLOAT, Case, empty

PEER_TARGETS = ("sm_80", "sm_90")
# Peers of which no machine code can be had here, and why.
NOT_COMPILED = {
    "torch.topk and sort": "torch's CUDA build ships their machine code; nothing is compiled by Triton",
    "scaled_dot_product_attention with a mask": "torch's CUDA build ships its machine code",
    "flash-attn": "CUDA sources, compiled by nvcc when it is installed",
}


def liger_rms_norm() -> None:
    """Liger-Kernel's norm, without a score; it also writes the inverse norms, for a backward."""
    from liger_kernel.ops.rms_norm import rms_norm_forward

    rms_norm_forward(empty(32 * 2048, 4096), empty(4096), 1e-5, 0.0, "llama", None)


def flag_gems_top_k(which: str) -> Any:
    """One of the two launches of FlagGems' top-k: 682 of 2,048 scores, with the settings that its wrapper computes."""
    rows, tokens, k, chunk = 8, 2048, 682, 1024
    chunks = tokens // chunk

    def some(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return empty(rows * n, dtype=FLOAT), empty(rows * n, dtype=torch.int64)

    def launch() -> None:
        _let_flag_gems_import()
        from flag_gems.ops.topk import topk_stage1_kernel, topk_stage2_kernel

        found = {"launch 1": topk_stage1_kernel, "launch 2": topk_stage2_kernel}[which]
        while type(found).__name__ != "JITFunction":  # under wrappers that ask the driver
            found = found.fn
        if which == "launch 1":
            found[(rows, chunks)](*some(chunks * k), empty(rows, tokens, dtype=FLOAT), k, tokens, chunk, False)
        else:
            found[(rows,)](*some(k), *some(chunks * k), 1, k, chunks * k, 2048, False)

    return launch


def _let_flag_gems_import() -> None:
    """Its import asks for the GPU's name and size, to look for tuned settings; the top-k has none."""

    class Absent:
        name, major, minor, multi_processor_count, total_memory = "absent", 9, 0, 132, 80 << 30

    os.environ["GEMS_VENDOR"] = "nvidia"
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda *_: Absent.name
    torch.cuda.get_device_capability = lambda *_: (Absent.major, Absent.minor)
    torch.cuda.get_device_properties = lambda *_: Absent


def flex_attention(head_dim: int) -> Any:
    """FlexAttention with a block mask by positions, grouped heads, and a number of keys that its blocks divide."""

    def launch() -> None:
        from benchmarks.static.flex import launch

        launch(head_dim, 4)

    return launch


PEERS: tuple[Case, ...] = (
    Case("peers", "FlexAttention dim 64, groups of 4", flex_attention(64)),
    Case("peers", "FlexAttention dim 128, groups of 4", flex_attention(128)),
    Case("peers", "Liger-Kernel rms_norm 4096 bfloat16", liger_rms_norm),
    Case("peers", "FlagGems topk 682 of 2048 tokens, launch 1 of 2", flag_gems_top_k("launch 1")),
    Case("peers", "FlagGems topk 682 of 2048 tokens, launch 2 of 2", flag_gems_top_k("launch 2")),
)
