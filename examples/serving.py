"""A plan in vLLM, from Python. For `vllm serve` and what each kind of plan guarantees see docs/vllm.md.

python examples/serving.py HUB_ID_OR_PATH PLAN "A long prompt ..." "Another ..."
"""

import argparse
from typing import Any

if __name__ == "__main__":  # before the imports below, which take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="HUB_ID_OR_PATH")
    parser.add_argument("plan", metavar="PLAN", help="a plan file, its folder, or org/name")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    given = parser.parse_args()

from transformers import AutoConfig

from orthorank import OrthoRankConfig
from orthorank.serving.vllm import Serving, vllm_arguments


def engine(model: str, plan: str, **more: Any) -> Any:
    """A `vllm.LLM` that serves ``model`` with ``plan`` (a folder, or org/name); ``more``: other arguments of vLLM.

    What no server can serve, or does not fit the model, is refused here, before vLLM starts.
    """
    serving = Serving(OrthoRankConfig.from_pretrained(plan))
    arguments = vllm_arguments(serving, AutoConfig.from_pretrained(model))
    from vllm import LLM

    return LLM(model, **arguments, **more)


def main(model: str, plan: str, prompts: list[str]) -> None:
    from vllm import SamplingParams

    llm = engine(model, plan)
    for answer in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64)):
        print(answer.prompt, "->", answer.outputs[0].text)


if __name__ == "__main__":
    main(given.model, given.plan, given.prompts)
