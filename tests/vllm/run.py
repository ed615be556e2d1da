"""One engine in a process of its own: `python -m tests.vllm.run JOB`, a JSON file; what it answers goes to JOB.out."""

import json
import os
import sys
from pathlib import Path

from tests.vllm.interpreter import let_the_interpreter_be_triton


def main(job: Path) -> None:
    """Run the job."""
    asked = json.loads(job.read_text())
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        let_the_interpreter_be_triton()
    from vllm import LLM

    from tests.vllm.engines import ask

    answers = ask(LLM(**asked["settings"]), asked["prompts"])
    Path(f"{job}.out").write_text(json.dumps([list(answer) for answer in answers]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
