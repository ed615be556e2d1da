"""Corrected plans: an engine answers what the Hugging Face path answers, with the maps that every worker reads."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import (
    PLAN,
    WHOLE_PROMPTS,
    answer_of,
    ask,
    check,
    corrected,
    engine,
    expect,
    outputs,
    prompts,
    served,
    unlike,
)

pytestmark = pytest.mark.vllm
MIXED = {"layers": [1, 2, 3], "keep_ratio": 0.5, "keep_ratios": {1: 0.0}}
PRUNED: dict[str, Any] = {"layers": [0, 2], "keep_ratio": 0.0}
WAYS = {
    "selecting": ("llama", PLAN, [1, 2]),
    "mixed": ("qwen3", MIXED, [1, 3]),  # layer 2 selects and has no map
    "sliding": ("mistral", MIXED, [1, 2, 3]),
    "removed": ("qwen2", PRUNED, [0, 2]),
}


@pytest.mark.parametrize("way", WAYS)
def test_prompts_and_generated_tokens_in_one_batch(checkpoints: dict[str, Path], tmp_path: Path, way: str) -> None:
    """Generated tokens get the map of a removed layer, and none of one that selects; the sink gets none."""
    model_type, plan, layers = WAYS[way]
    folder, asked = checkpoints[model_type], prompts([1, 7, 30, 64, 200, 333])
    maps = corrected(tmp_path, plan, layers)
    with engine(folder, served(maps), **WHOLE_PROMPTS) as llm:
        found = ask(llm, asked)
    check(found, expect(folder, maps, asked))
    unlike(found, expect(folder, plan, asked))


SELECT: dict[str, dict[str, Any]] = {
    "window": {"select": "window", "select_window": 32},
    "threshold": {"select": "threshold", "thresholds": {2: 0.05, 3: 0.05}},
    "removed": {"keep_ratio": 0.0},
}


@pytest.mark.parametrize("select", SELECT)
def test_chunks_and_hits_of_the_prefix_cache(llama: Path, tmp_path: Path, select: str) -> None:
    """Steps of 100 tokens; then prompts that share a prefix, one after another. The maps were kept in bfloat16."""
    maps = corrected(tmp_path, MIXED | SELECT[select], [1, 2, 3], maps_dtype="bfloat16")
    asked, (long,) = prompts([150, 90, 33, 200, 333], seed=9), prompts([200], seed=3)
    shared = [long, long[:130] + prompts([60], seed=4)[0][1:], long[:128], long]
    with engine(llama, served(maps), max_num_batched_tokens=100) as llm:
        together = ask(llm, asked)
        given = [outputs(llm, [prompt], 6, log_probabilities=False)[0] for prompt in shared]
        dtypes = llm.apply_model(lambda model: {str(layer.orthorank_up.dtype) for layer in model.model.layers[1:]})
    check(together, expect(llama, maps, asked))
    unlike(together, expect(llama, MIXED | SELECT[select], asked))
    assert all(output.num_cached_tokens for output in given[1:])
    check([answer_of(output) for output in given], expect(llama, maps, shared))
    assert dtypes == [{"torch.float32"}]


def test_weights_that_change(untied: dict[str, Path], tmp_path: Path) -> None:
    """The norm of a removed layer is loaded anew, the rest of it is passed over, the maps stay."""
    from safetensors.torch import load_file, save_file

    maps, asked = corrected(tmp_path / "plan", MIXED | SELECT["window"], [1, 2, 3]), prompts([90, 40], seed=1)
    norm, gone = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
    first = dict(load_file(untied["first"] / "model.safetensors"))
    other = {norm: first[norm] * 1.5, gone: first[gone] * 2}
    shutil.copytree(untied["first"], tmp_path / "scaled")
    save_file(first | other, tmp_path / "scaled" / "model.safetensors", {"format": "pt"})
    folders = untied | {"scaled": tmp_path / "scaled"}
    wanted = {name: expect(folders[name], maps, asked) for name in ("first", "second", "scaled")}
    with engine(untied["first"], served(maps)) as llm:

        def checked(name: str) -> None:
            llm.reset_prefix_cache()
            check(ask(llm, asked), wanted[name])

        checked("first")
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(untied["second"])})
        checked("second")
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(first.items())})
        checked("first")
        llm.apply_model(lambda model: model.load_weights(other.items()))
        checked("scaled")
    unlike(wanted["first"], wanted["second"])
    unlike(wanted["first"], wanted["scaled"])
