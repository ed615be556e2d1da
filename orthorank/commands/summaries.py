"""What the lists of commands say of each, in a line, and the examples that end each command's help."""

SHORT = {
    "demo": "The whole job: sink, plans, quality, speed, and a report.",
    "doctor": "Say whether OrthoRank applies to a model, and why.",
    "estimate": "What a plan could save on a model; downloads no weights.",
    "bench": "Time prefill, first token and decoding, dense and with plans.",
    "env": "Versions, devices, and which implementation each op takes.",
    "reproduce": "Measure the paper's tables and figures on a model.",
    "analyze": "Draw the paper's figures of a model.",
    "search": "Choose the layers of a plan.",
    "calibrate": "Find the thresholds of a plan that selects by thresholds.",
    "correct": "Fit maps that put back part of what a plan leaves out.",
    "compare": "Answers of dense model and plans side by side, and losses.",
    "export": "Write a model without the layers that a plan removes.",
    "vllm-args": "Print the arguments with which vLLM serves a plan.",
    "lm-eval": "lm-evaluation-harness's own command line, with plans.",
    "eval": "Measure perplexity, tasks or LongBench, dense and with plans.",
    "eval ppl": "Perplexity of a text, dense and with a plan.",
    "eval tasks": "Accuracy on tasks of lm-evaluation-harness.",
    "eval longbench": "LongBench's English and code tasks.",
}
EXAMPLES = {
    "demo": [
        "orthorank demo",
        "orthorank demo --model meta-llama/Llama-3.1-8B --text my.txt --sparsity 20%",
    ],
    "doctor": ["orthorank doctor meta-llama/Llama-3.1-8B", "orthorank doctor ./my-model --json"],
    "estimate": [
        "orthorank estimate llama-3-8b --sparsity 20%",
        "orthorank estimate ./my-model --plan my-plan --prompt 2048 --prompt 32768",
    ],
    "bench": [
        "orthorank bench ./my-model --plan my-plan --prompt-tokens 4096",
        "orthorank bench --random-weights llama-3-8b --prompt-tokens 8192 --graph",
    ],
    "env": ["orthorank env", "orthorank env --json"],
    "reproduce": [
        "orthorank reproduce ./my-model --output paper --quick",
        "orthorank reproduce ./my-model --output paper --only table1 --tasks piqa",
    ],
    "analyze": ["orthorank analyze ./my-model --text my.txt --output figures"],
    "search": [
        "orthorank search ./my-model --text my.txt --sparsity 20% --output my-plan",
        "orthorank search ./my-model --dataset wikitext2 --correct 64 --fast",
        "orthorank search ./my-model --text my.txt --max-loss 0.05 --output my-plan",
    ],
    "calibrate": ["orthorank calibrate ./my-model --plan my-plan --text my.txt --output with-thresholds"],
    "correct": [
        "orthorank correct my-plan ./my-model --text my.txt --output better",
        "orthorank correct my-plan ./my-model --text my.txt --distill 64 --output better",
    ],
    "compare": [
        "orthorank compare ./my-model --plan my-plan --plan better --prompts prompts.jsonl",
        "orthorank compare ./my-model --plan better --prompts prompts.jsonl --max-loss 0.05",
    ],
    "export": ["orthorank export ./my-model --plan pruned --output smaller-model"],
    "vllm-args": ["orthorank vllm-args my-plan", "orthorank vllm-args my-plan --python"],
    "lm-eval": ["orthorank lm-eval --model orthorank --model_args pretrained=MODEL,plan=PLAN --tasks piqa"],
    "eval ppl": ["orthorank eval ppl ./my-model --plan my-plan --dataset wikitext2"],
    "eval tasks": ["orthorank eval tasks ./my-model --plan my-plan --tasks piqa,arc_easy"],
    "eval longbench": ["orthorank eval longbench ./my-model --plan my-plan --data longbench.jsonl"],
}


def epilog(name: str) -> str | None:
    """The end of a command's help; ``\\b`` keeps the lines as they are."""
    lines = EXAMPLES.get(name)
    return None if lines is None else "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
