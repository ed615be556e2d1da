"""Plan files that were changed at random: followed, or refused in a sentence, nothing half done."""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from tests.orthorank.models import tiny

LAYERS = 4
PLAN: dict[str, Any] = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3).to_dict()
VALUES: list[Any] = [
    *(-1, 0, 1, 2, 3, 4, 5, 0.5, 1.0, -0.5, 1e-300, 1e300, 10**400, 2**31, 2**63, 2**70),
    *(
        None,
        True,
        False,
        "",
        "x",
        "topk",
        "window",
        "threshold",
        "inverse",
        "random",
        "selected",
        "auto",
        "99.0",
        "llama",
    ),
    *(
        [],
        [0],
        [1, 1],
        [3, "a"],
        [1.5],
        [None],
        [[1]],
        list(range(2000)),
        {},
        {"1": 0.5},
        {"1": 2},
        {"a": 1},
        {"1": None},
    ),
    *(float("nan"), float("inf"), {"2": 10**400}, {"-1": 0.1}, {"1": 0.3, "2": 0.9}, "\x00", "é" * 300, [[[[[]]]]]),
]
TEXTS = [
    "",
    "{",
    "null",
    "[]",
    "3",
    '"x"',
    "{}",
    '{"layers": [1], "layers": [2]}',
    "[" * 5000,
    "\ufeff{}",
    '{"layers": [1]}\0',
]
FINE: list[dict[str, Any]] = [
    *({"keep_ratio": x} for x in (0, 0.1, 0.5, 0.99, 1)),
    *({"criterion": x, "seed": 2**70} for x in ("inverse", "random", "cosine", "prenorm")),
    *({"select": "window", "select_window": x} for x in (1, 2, 7, 4096)),
    *({"select": "threshold", "thresholds": {"1": x, "2": 0.5}} for x in (0, 3.5, 1e300)),
    *({"layers": x} for x in ([0], [3, 1, 1], [0, 1, 2, 3])),
    *({"kv": "selected"}, {"update_sink": True}, {"sinks": "auto"}, {"keep_ratios": {"2": 0}}, {"keep_last": 40}, {}),
]


def plan_text(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(TEXTS)
    values = PLAN | rng.choice(FINE) | rng.choice(FINE)
    if rng.random() < 0.4:
        return json.dumps(values)
    for _ in range(rng.choice([1, 1, 2, 3])):
        values[rng.choice([*PLAN, "no_such_field"])] = rng.choice(VALUES)
    if rng.random() < 0.1:
        values.pop(rng.choice(sorted(values)))
    text = json.dumps(values)
    if rng.random() < 0.1:
        text = text[: rng.randrange(len(text))]
    return text


def left_over(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".part", ".tmp"))]


def follow_a_plan(seed: int, folder: Path, model: Any) -> str:
    """One plan file: "followed" or "refused"."""
    rng = random.Random(seed)
    file = folder / f"{seed}.json"
    text = plan_text(rng)
    file.write_text(text, encoding="utf-8")
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(seed))
    refusal = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = OrthoRankConfig.from_pretrained(file)
            saved = plan.save_pretrained(folder / f"saved-{seed}")
            assert OrthoRankConfig.from_pretrained(saved).to_dict() == plan.to_dict()
            with apply(model, plan), torch.no_grad():
                logits = model(ids, use_cache=False).logits
        assert logits.isfinite().all()
    except OrthoRankError as error:
        refusal = str(error) or "no word"
    assert refusal != "no word"
    assert not left_over(folder)
    assert file.read_text(encoding="utf-8") == text
    assert "forward" not in vars(model)
    return "refused" if refusal else "followed"


def try_plans(seeds: range, folder: Path) -> None:
    model = tiny("llama-3").eval()
    outcomes = []
    for seed in seeds:
        try:
            outcomes.append(follow_a_plan(seed, folder, model))
        except BaseException as error:
            error.add_note(f"of plan {seed}: {(folder / f'{seed}.json').read_text(encoding='utf-8')[:300]}")
            raise
    assert {"followed", "refused"} <= set(outcomes)


def test_thirty_plans_at_random(tmp_path: Path) -> None:
    try_plans(range(30), tmp_path)


@pytest.mark.slow
def test_five_hundred_plans_at_random(tmp_path: Path) -> None:
    try_plans(range(100, 600), tmp_path)
