import hashlib
from typing import Any

import pytest
import torch

from orthorank import OrthoRankError
from orthorank.common.texts import Text, find_text, take_samples, tokenize


def take(tokens: int, **sizes: int) -> Any:
    defaults = {"windows": 2, "window": 10, "held_out_windows": 3, "held_out_len": 20}
    return take_samples(torch.arange(tokens), **(defaults | sizes))


def test_the_default_text_is_long_english_prose_and_the_same_every_time():
    text = find_text()
    words = text.content.split()
    assert len(words) > 40_000
    assert sum(word in ("the", "of", "is", "a") for word in words) > 0.1 * len(words)
    assert text.content == find_text().content
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()


def test_a_file_is_read_as_utf8(tmp_path):
    file = tmp_path / "prose.txt"
    file.write_text("Größe zählt", encoding="utf-8")
    assert find_text(file) == Text(str(file), "Größe zählt")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read: No such file"), (b"\xff\xfe\x00a", "not a UTF-8 text file"), (b" \n\n", "is empty")],
)
def test_a_file_that_is_no_text_is_named(tmp_path, content, words):
    file = tmp_path / "prose.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(OrthoRankError, match=words) as error:
        find_text(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("tokens", [40, 41, 60, 127, 1000])
@pytest.mark.parametrize(("windows", "held_out_windows"), [(1, 1), (2, 3), (2, 50)])
def test_no_token_is_in_both_parts_or_twice_in_one(tokens, windows, held_out_windows):
    samples = take(tokens, windows=windows, held_out_windows=held_out_windows)
    calibration, held_out = samples.calibration.flatten().tolist(), samples.held_out.flatten().tolist()
    assert len(set(calibration + held_out)) == len(calibration) + len(held_out)
    assert max(calibration) < min(held_out)
    assert samples.calibration.shape == (windows, 10)
    assert samples.held_out.shape == (min(held_out_windows, (tokens - tokens // 2) // 20), 20)
    for row in [*samples.calibration, *samples.held_out]:
        assert (row[1:] - row[:-1] == 1).all(), "a window is consecutive tokens"


def test_windows_are_spread_over_their_half():
    samples = take(1000, windows=2, held_out_windows=4)
    assert samples.calibration[:, 0].tolist() == [0, 250]
    assert samples.held_out[:, 0].tolist() == [500, 625, 750, 875]


@pytest.mark.parametrize(("tokens", "windows", "needed"), [(39, 1, 40), (99, 5, 100)])
def test_too_short_says_how_many_tokens_there_are_and_how_many_are_needed(tokens, windows, needed):
    with pytest.raises(OrthoRankError, match=rf"has {tokens} tokens and {needed} are needed"):
        take(tokens, windows=windows)
    take(needed, windows=windows)  # and that many suffice


@pytest.mark.parametrize("wrong", [{"windows": 0}, {"window": 1}, {"held_out_windows": 0}, {"held_out_len": 1}])
def test_sizes_out_of_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(OrthoRankError, match=f"^{name} is {wrong[name]}; it must be"):
        take(1000, **wrong)


def test_the_text_is_tokenised_in_one_call():
    calls = []

    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        calls.append(text)
        return {"input_ids": [1, *(ord(letter) for letter in text)]}

    assert tokenize(Text("a note", "ab"), tokenizer).tolist() == [1, 97, 98]  # type: ignore[arg-type]
    assert calls == ["ab"]
