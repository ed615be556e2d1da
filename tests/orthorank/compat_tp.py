"""What each process of a tensor-parallel run does; started by test_compat_tensor_parallel.py under torchrun.

Each model lies in a folder of its own below the one that is named on the command line. What a process finds is written
there, too: what differs from the model in one process, and whether the processes agree bit by bit.
"""

import dataclasses
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from orthorank import OrthoRankConfig, apply
from orthorank.hf.provenance import differing, weights_fingerprint
from tests.orthorank.hf.test_corrected import maps

PLAN = OrthoRankConfig(layers=[1, 2, 3], keep_ratio=1 / 3)
PLANS = {"plain": PLAN, "corrected": dataclasses.replace(PLAN, correction=maps([1, 2, 3]))}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def load_sharded(folder: Path) -> Any:
    """The model of ``folder``, sharded by its own plan over all processes."""
    try:
        from transformers.distributed import DistributedConfig

        settings: dict[str, Any] = {
            "distributed_config": DistributedConfig(tp_plan="auto", tp_size=int(os.environ["WORLD_SIZE"]))
        }
    except (ImportError, TypeError):  # older transformers
        settings = {"tp_plan": "auto"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def batch() -> tuple[Tensor, Tensor]:
    """Token ids and mask of two rows, the first with padding on the left."""
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids * mask, mask


def equal_everywhere(x: Tensor) -> bool:
    """Whether ``x`` has the same bits in every process."""
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x.contiguous())
    return all(torch.equal(x, other) for other in gathered)


@torch.no_grad()
def watched(model: Any, plan: OrthoRankConfig) -> dict[str, Any]:
    """Logits, what each layer selects, the states that it selects from, and generated tokens, under the plan."""
    ids, mask = batch()
    seen: dict[str, Any] = {"positions": [], "states": []}
    with apply(model, plan) as handle:
        hooks = [
            model.model.layers[layer].register_forward_pre_hook(lambda m, args: seen["states"].append(args[0]))
            for layer in plan.layers
        ]
        with handle.watching(lambda layer, positions, call: seen["positions"].append(positions)):
            seen["logits"] = model(ids, attention_mask=mask).logits[mask.bool()]
        for hook in hooks:
            hook.remove()
        seen["tokens"] = model.generate(ids, attention_mask=mask, **GREEDY)
    return seen


def examine(sharded: Any, whole: Any, plan: OrthoRankConfig) -> dict[str, Any]:
    """What one process finds of one model."""
    parallel, alone = watched(sharded, plan), watched(whole, plan)
    projection = sharded.model.layers[1].self_attn.o_proj.weight
    local = projection.to_local() if hasattr(projection, "to_local") else projection
    fingerprints = weights_fingerprint(sharded), weights_fingerprint(whole)
    return {
        "other weights": differing(*fingerprints),
        "sharded": local.numel() < whole.model.layers[1].self_attn.o_proj.weight.numel(),
        "error": float((parallel["logits"] - alone["logits"]).abs().max() / alone["logits"].abs().max()),
        "same positions": all(map(torch.equal, parallel["positions"], alone["positions"])),
        "same tokens": torch.equal(parallel["tokens"], alone["tokens"]),
        "selections": len(parallel["positions"]),
        "bits": all(map(equal_everywhere, [*parallel["positions"], *parallel["states"], parallel["logits"]])),
    }


def main(folder: Path) -> None:
    """Examine every model below ``folder``."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for model in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
            sharded = load_sharded(model)
            found |= {f"{model.name}, {name}": examine(sharded, whole, plan) for name, plan in PLANS.items()}
        except Exception:
            found[model.name] = {"failed": traceback.format_exc()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
