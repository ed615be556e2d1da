"""``orthorank lm-eval``: the command line of lm-evaluation-harness, with the model ``orthorank`` known to it."""

import typer

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def command(context: typer.Context) -> int:
    """lm-evaluation-harness with the model orthorank: --model orthorank --model_args pretrained=...,plan=...

    Everything after lm-eval goes to the harness as it is.
    """
    from orthorank.evaluation.lm_eval import main

    return main(context.args)
