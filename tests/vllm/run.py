"""One engine in a process of its own: `python -m tests.vllm.run JOB`, a JSON file; what it answers goes to JOB.out.

A job has ``settings`` of the engine and ``prompts``, which are asked at once, or ``steps``: what is done one after
another, each ``{"ask": prompts}``, ``{"one by one": prompts}``, ``{"converse": inputs}``, ``{"switch": on}`` or
``{"reload": folder}``; "one by one" may have "sampling": further sampling parameters.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.vllm.interpreter import let_the_interpreter_be_triton

TOKENS = 6


def main(job: Path) -> None:
    """Run the job."""
    asked = json.loads(job.read_text())
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        let_the_interpreter_be_triton()
    from vllm import LLM

    from tests.vllm.engines import ask

    llm = LLM(**asked["settings"])
    if "steps" in asked:
        given: Any = [_do(llm, step) for step in asked["steps"]]
    else:
        given = [list(answer) for answer in ask(llm, asked["prompts"])]
    Path(f"{job}.out").write_text(json.dumps(given))


def _do(llm: Any, step: dict[str, Any]) -> dict[str, Any]:
    """The answers of a step, the tokens that came from the cache, and how many requests were thrown out."""
    from tests.vllm.engines import answer_of, ask, converse, outputs

    tokens, thrown_out = step.get("tokens", TOKENS), _preemptions(llm)
    answers, cached, said = [], [], None
    if "ask" in step:
        answers = ask(llm, step["ask"], tokens, step.get("log_probabilities", False))
    elif "one by one" in step:
        for prompt in step["one by one"]:
            (output,) = outputs(llm, [prompt], tokens, log_probabilities=False, **step.get("sampling", {}))
            answers.append(answer_of(output))
            cached.append(output.num_cached_tokens)
    elif "converse" in step:
        answers = converse(llm, step["converse"], tokens)
    elif "switch" in step:
        said = llm.collective_rpc("orthorank_switch", args=(step["switch"],))
        llm.reset_prefix_cache()
    else:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": step["reload"]})
        llm.reset_prefix_cache()
    return {
        "answers": [list(answer) for answer in answers],
        "cached": cached,
        "said": said,
        "thrown out": _preemptions(llm) - thrown_out,
        "runner": llm.llm_engine.vllm_config.use_v2_model_runner,
    }


def _preemptions(llm: Any) -> int:
    """Counted from the first call on; 0 where the scheduler is in another process."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        return 0
    scheduler = core.scheduler
    if not hasattr(scheduler, "preempted_in_test"):
        scheduler.preempted_in_test, preempt = 0, scheduler._preempt_request

        def counted(*args: Any, **named: Any) -> Any:
            scheduler.preempted_in_test += 1
            return preempt(*args, **named)

        scheduler._preempt_request = counted
    return int(scheduler.preempted_in_test)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
