"""Perplexity: the windows, the mean, the BOS policies, and the dense anchor on a real model."""

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import orthorank
from orthorank.common.errors import OrthoRankError
from orthorank.evaluation import perplexity

WIKITEXT = Path(__file__).parents[4] / "shared" / "data" / "wikitext2" / "wiki.test.raw"


class Letters:
    """A tokenizer of lower-case letters, with BOS 1 where it is asked for; counts its calls."""

    def __init__(self, bos: int | None = 1, adds_bos: bool = True) -> None:
        self.bos_token_id, self.adds_bos, self.calls = bos, adds_bos, 0

    def __call__(self, text: str, add_special_tokens: bool = True, **rest: Any) -> dict[str, list[int]]:
        self.calls += 1
        ids = [3 + ord(letter) - ord("a") for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens and self.adds_bos else ids}


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return tiny_model("llama", num_hidden_layers=2)


def window_loss(model: Any, ids: list[int]) -> float:
    """The model's own loss of one window, in nats."""
    window = torch.tensor([ids])
    with torch.no_grad():
        return model(window, labels=window).loss.item()


def test_mean_over_windows(model: Any) -> None:
    ids = torch.randint(3, 128, (50,), generator=torch.Generator().manual_seed(0))
    result = perplexity(model, ids, window=12)
    expected = [window_loss(model, ids[i : i + 12].tolist()) for i in (0, 12, 24, 36)]
    assert result.window_losses == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / 4), rel=1e-5)
    assert (result.windows, result.window, result.tokens, result.predictions) == (4, 12, 48, 44)
    spread = torch.tensor(expected).std().item() / 2
    assert result.standard_error == pytest.approx(spread, rel=1e-3)
    assert result.ids_sha256 == hashlib.sha256(ids[:48].numpy().astype("<i8").tobytes()).hexdigest()
    assert result.text_sha256 is None


def test_ready_made_windows_and_batches(model: Any) -> None:
    ids = torch.randint(3, 128, (60,), generator=torch.Generator().manual_seed(0))
    alone = perplexity(model, ids, window=12)
    seen: list[tuple[int, int]] = []
    made = perplexity(model, ids.view(5, 12), batch_size=2, on_window=lambda done, total, _: seen.append((done, total)))
    assert made.window_losses == pytest.approx(alone.window_losses, rel=1e-5)
    assert made.ids_sha256 == alone.ids_sha256
    assert seen == [(2, 5), (4, 5), (5, 5)]
    two = perplexity(model, ids, window=12, windows=2)
    assert two.window_losses == alone.window_losses[:2]


def test_bos_policies(model: Any) -> None:
    text = "thequickbrownfoxjumpsoverthelazydog"
    letters = [3 + ord(letter) - ord("a") for letter in text]
    cuts = {
        "first": [[1, *letters[:9]], letters[9:19], letters[19:29]],
        "none": [letters[:10], letters[10:20], letters[20:30]],
        "every": [[1, *letters[:9]], [1, *letters[9:18]], [1, *letters[18:27]]],
    }
    for bos, windows in cuts.items():
        tokenizer = Letters()
        result = perplexity(model, text=text, tokenizer=tokenizer, window=10, bos=bos)
        expected = [window_loss(model, ids) for ids in windows]
        assert result.window_losses == pytest.approx(expected, rel=1e-5), bos
        assert tokenizer.calls == 1, "tokenised once"
        assert result.bos == bos
        assert result.text_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_plan_counts(tiny_model: Any) -> None:
    """The perplexity is that of the patched model, which updates exactly floor(window / 3) tokens: no keep_last."""
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(0))
    dense = perplexity(model, ids, window=32)
    with orthorank.apply(model, orthorank.OrthoRankConfig(layers=[2], keep_ratio=1 / 3)) as handle:
        planned = perplexity(model, ids, window=32)
        assert handle.stats[2].tokens_updated == 2 * 10
    assert planned.perplexity != dense.perplexity
    assert perplexity(model, ids, window=32) == dense


def test_long_windows_are_summed_in_slices(tiny_model: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=2048)
    ids = torch.randint(3, 128, (1300,), generator=torch.Generator().manual_seed(0))
    assert perplexity(model, ids, window=1300).loss == pytest.approx(window_loss(model, ids.tolist()), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "neither input_ids nor text"),
        ({"input_ids": torch.arange(9), "text": "abc"}, "both input_ids and text"),
        ({"input_ids": torch.arange(9), "window": 10}, "9 tokens, fewer than one window of 10"),
        ({"input_ids": torch.arange(29), "window": 10, "windows": 3}, "fills 2 windows of 10 tokens and windows is 3"),
        ({"input_ids": torch.arange(9), "window": 1}, "window is 1"),
        ({"input_ids": torch.arange(9), "window": 3, "windows": 0}, "windows is 0"),
        ({"input_ids": torch.arange(9), "window": 3, "batch_size": 0}, "batch_size is 0"),
        ({"input_ids": torch.rand(9), "window": 3}, "torch.float32"),
        ({"input_ids": torch.zeros(2, 3, 4).long()}, r"shape \[2, 3, 4\]"),
        ({"input_ids": torch.zeros(600).long(), "window": 600}, "made for at most 512"),
        ({"text": "abc"}, "without a tokenizer"),
        ({"text": "abc", "tokenizer": Letters(), "bos": "last"}, "bos is 'last'"),
        ({"text": "abc", "tokenizer": Letters(bos=None), "bos": "every", "window": 3}, "has no BOS token"),
    ],
)
def test_errors(model: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        perplexity(model, **arguments)


def test_training_mode_is_refused(model: Any) -> None:
    with pytest.raises(OrthoRankError, match="training mode"):
        perplexity(model.train(), torch.arange(20), window=10)


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"the WikiText-2 test file is not there: {WIKITEXT}")
def test_smollm2_on_wikitext(smollm2: tuple[Any, Any]) -> None:
    """The dense anchor: the first four windows of 1,024 tokens of WikiText-2 raw test."""
    model, tokenizer = smollm2
    text = WIKITEXT.read_text(encoding="utf-8")
    result = perplexity(model, text=text, tokenizer=tokenizer, window=1024, windows=4)
    assert result.perplexity == pytest.approx(23.24, abs=0.005)
    assert result.text_sha256 is not None
    assert result.text_sha256.startswith("173c87a5")
    assert result.tokens == 4096
