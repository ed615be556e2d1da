"""What it costs to look at a selected layer before it is taken apart, in microseconds of CPU time for each layer.

    python benchmarks/bench_call_checks.py [--layers 9] [--runs 2000]

The model is tiny: the look does not depend on its size. Printed: the median and the least of the runs; once without
hooks, and once with those that transformers leaves on every attention after a call with output_attentions=True. Five
microseconds a layer are allowed.
"""

import argparse
import statistics
import time

ALLOWED_US = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--runs", type=int, default=2000)
    arguments = parser.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from orthorank import OrthoRankConfig, apply

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=arguments.layers + 1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    plan = OrthoRankConfig(layers=list(range(arguments.layers)), keep_ratio=1 / 3)
    for name in ("no hooks", "capturing hooks"):
        with apply(model, plan) as handle:
            spent = []
            for _ in range(arguments.runs):
                begin = time.process_time_ns()
                handle.check_layers(model.config)
                spent.append((time.process_time_ns() - begin) / 1000 / arguments.layers)
        print(
            f"{name}: median {statistics.median(spent):.2f}, least {min(spent):.2f} us a layer (allowed {ALLOWED_US})"
        )
        with torch.no_grad():
            model(torch.arange(8)[None], output_attentions=True)


if __name__ == "__main__":
    main()
