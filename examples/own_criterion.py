"""A criterion of your own: update the tokens whose keys are the least like the sink token's key.

    python examples/own_criterion.py
    orthorank search --criterion own_criterion:keys_far_from_sink     # in this folder

The paper compares normalised states with the sink's; this compares what attention compares: keys, head by head. A token
is looked at alone, so the criterion is pointwise and goes with thresholds and with chunks of a prompt.
"""

import argparse

if __name__ == "__main__":  # before the imports below, which take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

import torch
from torch import Tensor

from orthorank import OrthoRankConfig, apply, register_criterion


def keys_far_from_sink(x: Tensor, sink: Tensor, valid: Tensor, *, keys: Tensor, sink_keys: Tensor) -> Tensor:
    """The mean over heads of the absolute cosine between a token's key and the sink's.

    Args:
        x: states behind the input norm ``[batch, tokens, hidden]``; sink: of the first token ``[batch, hidden]``.
        valid: bool ``[batch, tokens]``; what is given for other tokens is not looked at.
        keys: ``[batch, kv_heads, tokens, head_dim]``, not rotated; sink_keys: ``[batch, kv_heads, head_dim]``.

    Returns:
        float32 ``[batch, tokens]``, the smallest are updated.
    """
    return torch.cosine_similarity(keys.float(), sink_keys.float()[:, :, None], dim=-1).abs().mean(dim=1)


register_criterion("keys_far_from_sink", keys_far_from_sink, pointwise=True, needs=("keys", "sink_keys"))


def main() -> None:
    """A tiny random model, by the paper's criterion and by this one: which tokens of a prompt does layer 2 update?"""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(12)[None]
    for criterion in ("orthogonal", "keys_far_from_sink"):
        chosen: list[Tensor] = []
        with (
            torch.no_grad(),
            apply(model, OrthoRankConfig(layers=[2], criterion=criterion)) as handle,
            handle.watching(lambda layer, positions, call: chosen.append(positions)),  # noqa: B023, called at once
        ):
            model(ids)
        print(criterion, chosen[0][0].tolist())


if __name__ == "__main__":
    main()
