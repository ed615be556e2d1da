"""What the second turn of a chat finds in vLLM's prefix cache: blocks of generated tokens, used again or not.

SmolLM2-135M-Instruct in float32 with its shipped plan, selecting in windows and by thresholds. Each conversation: a
prompt of 500 tokens of the documentation of Python, 200 generated tokens, then both and 60 tokens more as the second
prompt. ``reuse="prompt"`` computes the generated tokens again as a prompt, ``reuse="all"`` takes them from the cache.
Run it in the environment of `make test-vllm`:

    .venv-vllm/bin/python benchmarks/bench_vllm_chat.py --json benchmarks/results/vllm_chat_smollm2.json
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from orthorank import OrthoRankConfig
from orthorank.calibration.thresholds import calibrate
from orthorank.common.files import write_json
from orthorank.common.texts import find_text, tokenize
from orthorank.models import load_model
from orthorank.plans import default_plan
from orthorank.serving.vllm.arguments import vllm_arguments
from orthorank.serving.vllm.serving import Serving

CONVERSATIONS, PROMPT, ANSWER, MORE, SECOND = 4, 500, 200, 60, 32
WINDOW = BLOCK = 64
BEST = 20  # tokens whose log-probabilities are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    options = parser.parse_args()
    model, tokenizer, info = load_model(None, "cpu", "float32")
    text = find_text(None)
    ids = tokenize(text, tokenizer)
    plan = dataclasses.replace(default_plan(model, sparsity=0.2), keep_last=1)
    plans = {
        "window": dataclasses.replace(plan, select="window", select_window=WINDOW),
        "threshold": calibrate(model, ids[: 4 * 512].view(4, 512), plan),
    }
    begin = 4 * 512  # what follows was not calibrated on
    length = PROMPT + MORE
    texts = [ids[begin + n * length : begin + (n + 1) * length].tolist() for n in range(CONVERSATIONS)]
    results: dict[str, Any] = {"model": info.to_dict(), "text": text.name, "text_sha256": text.sha256, "modes": {}}
    sizes = {"conversations": CONVERSATIONS, "prompt": PROMPT, "answer": ANSWER, "more": MORE, "second_answer": SECOND}
    results["sizes"] = sizes | {"window": WINDOW, "block": BLOCK, "best": BEST}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = model.config
        del model
        for name, each in plans.items():
            turns = {reuse: _second_turns(folder, config, each, reuse, texts) for reuse in ("prompt", "all")}
            results["modes"][name] = _compared(turns["prompt"], turns["all"])
            print(name, json.dumps(results["modes"][name]))
    if options.json is not None:
        write_json(options.json, results)


def _second_turns(
    folder: str, config: Any, plan: OrthoRankConfig, reuse: str, texts: list[list[int]]
) -> list[dict[str, Any]]:
    """What an engine answers in the second turn of each conversation."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    arguments = vllm_arguments(Serving(plan, reuse=reuse), config, block_size=BLOCK)
    llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=1024, **arguments)
    found = []
    for each in texts:
        first = _asked(llm, each[:PROMPT], ANSWER)
        second = _asked(llm, [*each[:PROMPT], *first.outputs[0].token_ids, *each[PROMPT:]], SECOND)
        scores = {token: one.logprob for token, one in second.outputs[0].logprobs[0].items()}
        found.append(
            {"cached": second.num_cached_tokens, "tokens": list(second.outputs[0].token_ids), "scores": scores}
        )
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def _asked(llm: Any, prompt: list[int], tokens: int) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=BEST)
    return llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]


def _compared(cold: list[dict[str, Any]], reused: list[dict[str, Any]]) -> dict[str, Any]:
    """How far apart the two are: over the tokens that are among the likeliest of both."""
    apart = [
        abs(score - b["scores"][token])
        for a, b in zip(cold, reused, strict=True)
        for token, score in a["scores"].items()
        if token in b["scores"]
    ]
    equal = [
        next((n for n, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if x != y), SECOND)
        for a, b in zip(cold, reused, strict=True)
    ]
    return {
        "cached": {"prompt": [a["cached"] for a in cold], "all": [b["cached"] for b in reused]},
        "first_token_difference": {"mean": statistics.fmean(apart), "largest": max(apart)},
        "equal_greedy_tokens": equal,
    }


if __name__ == "__main__":
    main()
