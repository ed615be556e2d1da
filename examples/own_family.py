"""A model family of one's own: GLM-4 (0414), which this package has no spec of.

Its decoder layer is GLM's with two more norms, one behind attention and one behind the MLP. That is the whole spec.
Nothing is downloaded: the model here is a small one with random weights. Run: python examples/own_family.py
"""

import argparse

if __name__ == "__main__":  # before the imports below, which take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

import torch
from transformers import Glm4Config, Glm4ForCausalLM

import orthorank

# What is not said is as in Llama: see the fields of orthorank.Family.
GLM_4 = orthorank.Family(
    "GLM-4",
    interleaved=True,  # channels 2j and 2j + 1 turn together
    attn_out_norm="post_self_attn_layernorm",
    mlp_out_norm="post_mlp_layernorm",
)


def small_model() -> Glm4ForCausalLM:
    """GLM-4's layers at a size that a laptop makes in a moment."""
    torch.manual_seed(0)
    config = Glm4Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    return Glm4ForCausalLM(config).eval()


def main() -> None:
    model = small_model()
    plan = orthorank.OrthoRankConfig(layers=[2, 3, 4], keep_ratio=1 / 3)

    orthorank.register_family("glm4", orthorank.Family("GLM-4", interleaved=True))  # the two norms forgotten
    try:
        orthorank.apply(model, plan)
    except orthorank.OrthoRankError as error:
        print(error)  # ... gives selected tokens other states than the dense layer does, by 4.8e+00 ...

    orthorank.register_family("glm4", GLM_4)
    print(f"largest difference: {orthorank.check_family(model):.0e}")
    with torch.no_grad(), orthorank.apply(model, plan):  # which would have checked it, too
        model(torch.arange(1, 91)[None])
        print(orthorank.status(model))


if __name__ == "__main__":
    main()
