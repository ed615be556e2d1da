"""Healing a plan: what it leaves out is put back by training, against the answers of the dense model.

    pip install peft
    python examples/healing.py                     # SmolLM2-135M with the plan that is shipped for it
    python examples/healing.py HUB_ID_OR_PATH      # on a GPU where there is one

Two ways. *Distilled corrections* train small linear maps beside the layers; the model's weights stay as they are, and
the plan is a folder that `apply` and vLLM read. *LoRA* (PEFT) trains low-rank changes of the weights, which are saved
and loaded as any adapter, beside a plan without maps. Both have the same teacher: the model without the plan.
"""

import argparse

if __name__ == "__main__":  # before the imports below, which take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="HUB_ID_OR_PATH")
    given = parser.parse_args()

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

import orthorank
from orthorank.plans import default_plan

Plan = orthorank.OrthoRankConfig


@torch.no_grad()
def answers(model: torch.nn.Module, windows: Tensor) -> list[Tensor]:
    """Log-probabilities of every next token, of each window [tokens, vocabulary]."""
    return [log_softmax(model(window[None]).logits[0].float(), -1) for window in windows]


def distance(model: torch.nn.Module, window: Tensor, taught: Tensor) -> Tensor:
    """KL divergence from the teacher's next token to the model's, in nats a token."""
    said = log_softmax(model(window[None]).logits[0].float(), -1)
    return kl_div(said, taught, reduction="batchmean", log_target=True)


@torch.no_grad()
def measured(model: torch.nn.Module, windows: Tensor, taught: list[Tensor]) -> float:
    return float(sum(distance(model, w, t) for w, t in zip(windows, taught, strict=True)) / len(windows))


def with_corrections(model: torch.nn.Module, windows: Tensor, plan: Plan, steps: int, rank: int) -> Plan:
    """The plan with maps: fitted in closed form, then trained."""
    fitted = orthorank.fit_correction(model, windows, plan, rank=rank)
    return orthorank.distill_correction(model, windows, fitted, steps=steps)


def with_lora(
    model: torch.nn.Module, windows: Tensor, taught: list[Tensor], plan: Plan, steps: int, rank: int
) -> torch.nn.Module:
    """The model with the plan applied and adapters that were trained under it, from PEFT."""
    orthorank.apply(model, plan)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    for step in range(steps):
        loss = distance(adapted, windows[step % len(windows)], taught[step % len(windows)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adapted


def heal(
    model: torch.nn.Module, windows: Tensor, held_out: Tensor, plan: Plan, steps: int = 64, rank: int = 64
) -> dict[str, float]:
    """KL divergence from the dense model on windows that nothing was trained on; the model keeps plan and adapters."""
    taught, asked = answers(model, windows), answers(model, held_out)
    found = {}
    with orthorank.apply(model, plan):
        found["the plan"] = measured(model, held_out, asked)
    with orthorank.apply(model, with_corrections(model, windows, plan, steps, rank)):
        found["corrections, distilled"] = measured(model, held_out, asked)
    adapted = with_lora(model, windows, taught, plan, steps, rank=8)
    found["LoRA"] = measured(adapted, held_out, asked)
    return found


def main(name: str | None) -> None:
    model, tokenizer, _ = orthorank.load_model(name)
    plan = default_plan(model) if name is None else Plan(layers=range(20, 25))  # or the folder of a search
    from pydoc_data.topics import topics  # Python's documentation, on every machine; take text of your own kind

    ids = tokenizer("\n".join(topics[name] for name in sorted(topics)), return_tensors="pt").input_ids[0]
    windows = ids[: 24 * 128].view(24, 128).to(model.device)  # answers to one of them: 25 MB
    for name, value in heal(model, windows[:16], windows[16:], plan).items():
        print(f"{name:<24} {value:.3f} nats a token from the dense model")


if __name__ == "__main__":
    main(given.model)
