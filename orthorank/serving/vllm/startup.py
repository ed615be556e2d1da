"""The line that a server logs when it starts with a plan."""

from typing import TYPE_CHECKING, Any

from orthorank.serving.vllm.checks import needs_scheduler
from orthorank.serving.vllm.counts import LOGGER as LOGGER

if TYPE_CHECKING:
    from orthorank.serving.vllm.serving import Serving

SELECT = {"topk": "the best of each prompt", "window": "the best of each window", "threshold": "below thresholds"}


def line(serving: "Serving", layers: int, attention: str | None, *, caching: bool) -> str:
    """What runs with the plan, and what does not.

    Args:
        serving: the plan and how it is served; layers: of the model.
        attention: how selected queries attend, in words; None: no layer selects.
        caching: whether vLLM uses its prefix cache.

    Example:
        >>> from orthorank import OrthoRankConfig
        >>> from orthorank.serving.vllm.serving import Serving
        >>> plan = OrthoRankConfig(layers=[2, 3], keep_ratio=0.5, keep_ratios={3: 0})
        >>> print(line(Serving(plan), 4, "paged", caching=False))
        OrthoRank: of 4 layers 2 selects 50 % of a prompt's tokens (topk, the best of each prompt, by 'orthogonal'), \
3 is removed; attention: paged; off: chunked prefill and prefix caching, as a prompt is ranked as a whole
    """
    plan, said = serving.plan, []
    if plan.selecting:
        ratios = sorted({plan.ratio(layer) for layer in plan.selecting})
        share = f"{ratios[0]:.0%}" if len(ratios) == 1 else f"{ratios[0]:.0%} to {ratios[-1]:.0%}"
        how = f"{plan.select}, {SELECT[plan.select]}"
        if plan.select_window is not None:
            how += f" of {plan.select_window}"
        long = f", prompts of {plan.min_prompt} tokens or more" if plan.min_prompt else ""
        verb = "select" if len(plan.selecting) > 1 else "selects"
        said.append(
            f"{_numbers(plan.selecting)} {verb} {share.replace('%', ' %')} of a prompt's tokens ({how}, by "
            f"{plan.criterion!r}{long})"
        )
    if removed := [layer for layer in plan.layers if plan.ratio(layer) == 0]:
        said.append(f"{_numbers(removed)} {'are' if len(removed) > 1 else 'is'} removed")
    if plan.correction is not None:
        said.append(f"{_numbers(list(plan.correction.layers))} corrected (rank {plan.correction.rank})")
    parts = [f"OrthoRank: of {layers} layers {', '.join(said) or 'none selects'}"]
    if attention is not None:
        parts.append(f"attention: {attention}")
    if off := _off(serving, caching=caching):
        parts.append(f"off: {off}")
    return "; ".join(parts)


def _off(serving: "Serving", *, caching: bool) -> str:
    """What of vLLM is not as it would be without a plan, and why."""
    plan = serving.plan
    if plan.select == "topk" and plan.selecting:
        return "chunked prefill and prefix caching, as a prompt is ranked as a whole"
    if not needs_scheduler(serving, caching):
        return ""
    why = []
    if plan.select == "window":
        why.append("chunks that end inside a window")
    if caching and serving.reuse == "prompt":
        why.append("cached blocks that are not of a prompt alone, as a cold run computes others (reuse 'prompt')")
    return " and ".join(why)


def attention_path(layer: Any, obstacle: str | None) -> str:
    """How the queries of a selecting layer attend, and why not by this package's kernel."""
    if layer.orthorank_paged:
        return "paged (this package's kernel)"
    asked = layer.orthorank.serving.attention == "portable"
    return f"portable (the backend's kernel, a request for each query): {'asked for' if asked else obstacle}"


def _numbers(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
