"""One engine in a process of its own: `python -m tests.vllm.run JOB`, a JSON file; what it answers goes to JOB.out."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace


def main(job: Path) -> None:
    """Run the job."""
    asked = json.loads(job.read_text())
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        _let_the_interpreter_be_triton()
    from vllm import LLM

    from tests.vllm.engines import ask

    answers = ask(LLM(**asked["settings"]), asked["prompts"])
    Path(f"{job}.out").write_text(json.dumps([list(answer) for answer in answers]))


def _let_the_interpreter_be_triton() -> None:
    """The second model runner asks for Triton with a driver; its kernels are small, and the interpreter runs them."""
    import triton.backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=driver)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
