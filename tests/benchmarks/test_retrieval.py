"""The benchmark of retrieval: what it asks, that an answer is what generate() gives, and what it counts."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench_retrieval import Kept, ask, has_scored_line, mean_of_groups, table_of
from benchmarks.retrieval.prompts import Context, make_context
from orthorank import OrthoRankConfig, apply
from tests.orthorank.plain_search import small_stack

PLANS = {
    "selected": OrthoRankConfig(layers=[1, 2, 3, 4], keep_ratio=0.2),
    "removed": OrthoRankConfig(layers=[2, 4], keep_ratio=0),
}


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


@pytest.mark.parametrize("name", PLANS)
def test_a_right_answer_is_what_generate_gives(name: str) -> None:
    """Over the cache of the text, where the question is a chunk of its own; and not what the dense model gives."""
    model = small_stack().model
    draw = torch.Generator().manual_seed(0)
    text, *asked = (torch.randint(0, 64, (1, count), generator=draw) for count in (40, 6, 9, 5, 7))

    @torch.inference_mode()
    def generated() -> list[list[int]]:
        cache = model(input_ids=text).past_key_values
        prompts = [torch.cat([text, question], 1) for question in asked]
        how: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        return [
            model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=copy.deepcopy(cache), **how
            )[0, ids.shape[1] :].tolist()
            for ids in prompts
        ]  # fmt: skip

    def context(answers: list[list[int]]) -> Context:
        return Context(text[0].tolist(), [(q[0].tolist(), a) for q, a in zip(asked, answers, strict=True)])

    dense, every = generated(), [True] * 4
    assert ask(model, context(dense), every) == [True] * 4
    assert ask(model, context(dense), [True, False, False, True]) == [True, False, False, True]
    with apply(model, PLANS[name]):
        own = generated()
        assert ask(model, context(own), every) == [True] * 4
        assert ask(model, context(dense), every) == [a == b for a, b in zip(own, dense, strict=True)] != [True] * 4
        wrong = [[*answer[:2], 63 - answer[2]] for answer in own]
        assert ask(model, context(wrong), every) == [False] * 4


def test_each_pair_stands_once_in_the_text_and_is_asked_for() -> None:
    paragraphs = [f"{letter * 180}." for letter in "abcdefgh"]
    found = make_context(Bytes(), paragraphs, 3000, 12, seed=3)
    text = bytes(found.ids).decode()
    assert 2600 < len(text) <= 3000
    asked = [bytes(question + answer).decode() for question, answer in found.questions]
    assert len(set(asked)) == 12
    for said in asked:
        assert text.count(said.strip()) == 1
        assert set(json.loads(said)) <= set(said.split('"'))
    places = [text.index(said.strip()) / len(text) for said in asked]
    assert places == sorted(places)
    assert [int(6 * place) for place in places] == [at for at in range(6) for _ in range(2)], "a sixth has two"
    assert make_context(Bytes(), paragraphs, 3000, 12, seed=3) == found
    assert make_context(Bytes(), paragraphs, 3000, 12, seed=4) != found


def test_only_what_the_dense_model_answers_is_counted() -> None:
    """Errors are between groups, of which each counts as one."""
    found = {
        "dense": [[1.0, 0.0, 1.0], [0.5], [0.4]],
        "a plan": [[1.0, 1.0, 0.0], [0.0], [1.0]],
        "a plan, corrected": [[1.0, 0.0, 1.0], [0.0], [1.0]],
    }
    table = table_of(found, {"dense": 1.0, "a plan": 0.8, "a plan, corrected": 0.81}, 0.5)
    assert [table[name] for name in ("tried", "answered", "groups")] == [5, 3, 2]
    assert table["dense_score"] == pytest.approx(100 * 2.9 / 5)
    dense, plain, corrected = table["rows"]
    assert [row["score"] for row in table["rows"]] == pytest.approx([100 * 2.5 / 3, 100 / 3, 200 / 3])
    assert [row["flops"] for row in table["rows"]] == [1.0, 0.8, 0.81]
    assert "against_plain" not in dense
    assert "against_plain" not in plain
    assert corrected["against_plain"]["difference"] == pytest.approx(100 / 3)
    assert corrected["against_plain"]["standard_error"] == pytest.approx(100 * math.sqrt(2 * (2 / 9)) / 3)


def test_the_error_of_groups_of_one_is_the_usual_one() -> None:
    values = [0.3, 0.9, 0.1, 0.4]
    usual = torch.tensor(values).std().item() / 2
    assert mean_of_groups([[value] for value in values]) == pytest.approx((0.425, usual))
    assert mean_of_groups([[1.0, 0.0], [], [1.0, 0.0]]) == (0.5, 0.0)
    assert all(map(math.isnan, mean_of_groups([[]])))
    assert math.isnan(mean_of_groups([[1.0, 0.0]])[1])


def test_an_answer_ends_with_the_line_that_is_scored() -> None:
    text = "# a\n\n  // b\n`c`\n  x = 1\nmore"
    ends = [end for end in range(len(text) + 1) if has_scored_line(text[:end])]
    assert text[: ends[0]] == "# a\n\n  // b\n`c`\n  x = 1\n"


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    asked: list[str] = []

    def measure(name: str) -> list[Any]:
        asked.append(name)
        return [name, True]

    kept = Kept(tmp_path)
    for name in ("a", "b", "a"):
        assert kept.get(lambda name=name: measure(name), {"plan": name}, [1, 2]) == [name, True]
    lines = kept.file.read_text().splitlines(keepends=True)
    kept.file.write_text(lines[0] + lines[1][:20])  # killed while it wrote the second
    again = Kept(tmp_path)
    for name in ("a", "b"):
        assert again.get(lambda name=name: measure(name), {"plan": name}, [1, 2]) == [name, True]
    assert asked == ["a", "b", "b"]
    assert again.minutes() == pytest.approx(sum(row["seconds"] for row in again.rows.values()) / 60)
