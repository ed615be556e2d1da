"""Keys and values of a selected layer in vLLM's cache, by vLLM's operations and in one launch: `python -m
tests.vllm.two_writes CHECKPOINT`.

Prints, for each layout, dtype and rotary embedding, what each way launched, how far apart the caches are, and whether
the one launch wrote what `apply_rotary_at` and a write by index do.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vllm.interpreter import let_the_interpreter_be_triton
from tests.vllm.two_ways import BLOCK, BLOCKS, DIM, HEADS, KV_HEADS, LAYOUTS, _cache

HIDDEN, TOKENS, PADDING, POSITIONS = 24, 37, 3, 512
SIZES = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
VIEWS = {"view", "split", "split_with_sizes", "slice", "transpose", "unsqueeze", "squeeze", "detach", "t", "select",
         "alias", "_unsafe_view", "unflatten", "flatten", "reshape", "chunk", "as_strided"}  # fmt: skip


class Launches(TorchDispatchMode):
    """Names of operators that are no views, and of Triton kernels, in order; of an operator not what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if name not in VIEWS:
            self.names.append(name if namespace == "aten" else f"{namespace}::{name}")
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        from triton.runtime import interpreter

        self.run, mode = interpreter.GridExecutor.__call__, self

        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            mode.names.append(self.fn.__name__)
            with torch._C._DisableTorchDispatch():
                return mode.run(self, *args, **kwargs)

        interpreter.GridExecutor.__call__ = called
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        from triton.runtime import interpreter

        interpreter.GridExecutor.__call__ = self.run
        super().__exit__(*error)


def main(checkpoint: Path) -> None:
    """All cases."""
    let_the_interpreter_be_triton()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # which launch settings: the interpreter has none
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    found = []
    for dtype in ("float32", "float16"):
        config = EngineArgs(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            dtype=dtype,
            block_size=BLOCK,
            max_model_len=POSITIONS,
            compilation_config={"custom_ops": ["+rotary_embedding"]},  # its kernel, as on a GPU
        ).create_engine_config()
        with set_current_vllm_config(config), torch.no_grad():
            for kind, rotary in rotary_embeddings(getattr(torch, dtype)).items():
                for layout in LAYOUTS if (kind, dtype) == ("half-split", "float16") else LAYOUTS[:1]:
                    case = {"dtype": dtype, "kind": kind, "layout": layout}
                    found.append(case | compare(config, getattr(torch, dtype), layout, rotary))
    print(json.dumps(found))


def rotary_embeddings(dtype: torch.dtype) -> dict[str, Any]:
    """vLLM's, of the kinds that its models here may have."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding

    class Other(RotaryEmbedding):
        """Whose forward on a GPU nobody knows."""

        def forward_cuda(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> Any:
            return self.forward_native(positions, query, key)

    return {
        "half-split": RotaryEmbedding(DIM, DIM, POSITIONS, 10000.0, True, dtype),
        "interleaved, a part": RotaryEmbedding(DIM, DIM // 2, POSITIONS, 10000.0, False, dtype),
        "Llama 3": Llama3RotaryEmbedding(DIM, DIM, POSITIONS, 10000.0, True, dtype, 8.0, 1.0, 4.0, 128),
        "YaRN": YaRNScalingRotaryEmbedding(DIM, DIM, POSITIONS // 4, 10000.0, True, 4.0, dtype),  # which scales tables
        "another forward": Other(DIM, DIM, POSITIONS, 10000.0, True, dtype),
    }


def compare(config: Any, dtype: torch.dtype, layout: str, rotary: Any) -> dict[str, Any]:
    """One case."""
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    from orthorank.packed.views import split_last
    from orthorank.serving.vllm.attention import writes_plainly
    from orthorank.serving.vllm.layer import LayerParts
    from orthorank.serving.vllm.projections import Projections
    from orthorank_kernels import apply_rotary_at

    torch.manual_seed(0)
    name = f"layers.0.{layout}.{len(config.compilation_config.static_forward_context)}"
    attention = Attention(HEADS, DIM, DIM**-0.5, num_kv_heads=KV_HEADS, cache_config=config.cache_config,
                          attn_backend=TritonAttentionBackend, prefix=name)  # fmt: skip
    attention.kv_cache = _cache(layout, dtype)
    assert writes_plainly(attention, dtype)
    self_attn = SimpleNamespace(
        attn=attention, qkv_proj=merged(dtype), q_size=SIZES[0], kv_size=SIZES[1], head_dim=DIM, num_heads=HEADS,
        num_kv_heads=KV_HEADS, rotary_emb=rotary,
    )  # fmt: skip
    normed, positions = torch.randn(TOKENS + PADDING, HIDDEN).to(dtype), torch.randint(POSITIONS, (TOKENS + PADDING,))
    slots = torch.randperm(BLOCKS * BLOCK)[:TOKENS]
    slots[5] = -1
    projections, caches, launched = Projections(self_attn), [], []
    for writes in (False, True):
        attention.kv_cache.zero_()
        layer = SimpleNamespace(self_attn=self_attn, orthorank_writes=writes)
        with set_forward_context({}, config, slot_mapping={name: slots}), Launches() as seen:
            LayerParts(layer, None, positions, projections).project(normed)
        caches.append(attention.kv_cache.clone())
        launched.append(seen.names)
    keys, values = projections.unrotated(normed)
    rotation = projections.rotation
    expected = None
    if rotation is not None:
        how = {n: v for n, v in rotation.items() if n not in ("cos", "sin")}
        at = slots[slots >= 0] // BLOCK, slots[slots >= 0] % BLOCK
        attention.kv_cache.zero_()
        there = (slots >= 0).nonzero()[:, 0]
        turned = apply_rotary_at(keys[there], rotation["cos"], rotation["sin"], positions[there].int(), **how)
        k_cache, v_cache = split_last(attention.kv_cache, DIM)
        k_cache[at], v_cache[at] = turned, values[there]
        expected = torch.equal(attention.kv_cache, caches[1])
    return {"launched": launched, "apart": distance(*caches), "as apply_rotary_at": expected}


def merged(dtype: torch.dtype) -> Any:
    """vLLM's weight for queries, keys and values, as an ordinary matrix."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    layer = torch.nn.Linear(HIDDEN, sum(SIZES), dtype=dtype)
    layer.quant_method = object.__new__(UnquantizedLinearMethod)
    return layer


def distance(a: Tensor, b: Tensor) -> float:
    assert a.count_nonzero() > 0
    return (a.double() - b.double()).abs().max().item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
