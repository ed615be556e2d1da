"""The command line of lm-evaluation-harness with the model ``orthorank`` registered.

The harness knows only its own models. This registers ours and passes all arguments on to it:

    python -m orthorank.evaluation.lm_eval run --model orthorank \\
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,plan=my-plan --tasks piqa
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the harness with ``arguments`` (None: the process's own) and return its exit code.

    Raises:
        OrthoRankError: the harness is not installed.
    """
    import orthorank.evaluation.tasks  # noqa: F401 - registers the model

    from lm_eval.__main__ import cli_evaluate  # isort: skip - the line above says what to do without the harness

    given = list(sys.argv[1:] if arguments is None else arguments)
    before, sys.argv = sys.argv, ["orthorank lm-eval", *given]
    try:
        cli_evaluate()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
