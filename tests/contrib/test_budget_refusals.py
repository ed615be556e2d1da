"""What `python -m contrib.budget` refuses: each sentence says what is wrong and what may be."""

import math
from pathlib import Path
from typing import Any

import pytest

from contrib.budget.__main__ import main
from contrib.budget.job import run_search
from orthorank import OrthoRankConfig, OrthoRankError
from tests.contrib.test_budget_command import settings
from tests.orthorank.search.test_search_command import Watcher


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 0.0}, "budget is 0; it must be above 0"),
        ({"budget": 1.2}, r"budget is 1\.2"),
        ({"budget": math.nan}, "budget is nan"),
        ({"sparsity": 0.2}, "sparsity is for plans of one form"),
        ({"layers": 2}, "layers is for plans of one form"),
        ({"method": "influence"}, "method is influence"),
        ({"keep_ratio": 0.0}, "keep_ratio is 0, and with a budget"),
        ({"budget_unit": "joules"}, "budget_unit is 'joules'; it may be flops or time"),
        ({"keep_ratios": (0.5, 1.0)}, "a ratio in keep_ratios is 1"),
        ({"keep_ratios": ()}, "keep_ratios is empty"),
        ({"starts": ("none", "a.json")}, "starts is none and a plan file"),
        ({"exchanges": -1}, "exchanges is -1"),
        ({"prompt_tokens": 1}, "prompt_tokens is 1"),
    ],
)
def test_settings_say_what_is_wrong(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(OrthoRankError, match=words):
        settings(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"starts": ("nowhere.json",)}, "no plan can be read at nowhere"),
        ({"starts": ("~nobody-here/plan.json",)}, "no such home directory"),
        ({"prompt_tokens": 10_000}, "prompt_tokens is 10000; the model's longest input has 512"),
        ({"budget": 0.01, "starts": ("none",)}, r"budget is 0\.01, and the cheapest plan costs"),
        ({"protect_first": 3, "protect_last": 3}, "no layer may be chosen"),
    ],
)
def test_searches_say_what_is_wrong(changes: dict[str, Any], words: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OrthoRankError, match=words):
        run_search(settings(tiny_folder, tmp_path, **changes), Watcher())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": [2], "num_hidden_layers": 30}, "made for a model with num_hidden_layers 30"),
        ({"layers": [9]}, "layers holds 9"),
        ({"layers": [2], "criterion": "inverse"}, "whose criterion is 'inverse'"),
        ({"layers": [2], "kv": "selected"}, "whose kv is 'selected'"),
    ],
)
def test_plans_that_do_not_fit(fields: dict[str, Any], words: str, tiny_folder: Path, tmp_path: Path) -> None:
    OrthoRankConfig(**fields).save_pretrained(tmp_path / "plan")
    with pytest.raises(OrthoRankError, match=words):
        run_search(settings(tiny_folder, tmp_path / "out", starts=(str(tmp_path / "plan"),)), Watcher())


def test_a_criterion_of_ones_own_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an unknown one is told to give, ``--criterion module:function``, is read here as everywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_this_search.py").write_text("def fn(x, sink, valid):\n    return x\n")
    assert main(["--budget", "0.8", "--criterion", "of_this_search:fn"]) == 2
    assert "criterion 'of_this_search:fn' gave a float32 tensor of shape [4, 12, 64]" in capsys.readouterr().err


def test_forms_that_the_budget_does_not_allow(tiny_folder: Path, tmp_path: Path) -> None:
    """At 0.95 a layer of six is more than is due; the search goes on from the dense model."""
    watcher = Watcher()
    results = run_search(settings(tiny_folder, tmp_path, budget=0.95, exchanges=1, keep_ratios=(0.5, 0.0)), watcher)
    assert [row["name"] for row in results["rows"]] == ["dense", "mixed"]
    assert sum("less than one layer" in words for words in watcher.said) == 2
