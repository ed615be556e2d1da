"""The dense model and plans side by side: against generate() and its steps, one after the other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply, handle_of
from orthorank.evaluation import compare
from orthorank.evaluation.answer_cache import as_before, owner_of
from orthorank.evaluation.compare import compare_plans
from orthorank.evaluation.prompts import Prompt, read_prompts, sample_prompts
from tests.orthorank.hf.test_corrected import maps

PLANS = {
    "orthorank": OrthoRankConfig(layers=[2, 3, 4], keep_ratio=0.3),
    "layer pruning": OrthoRankConfig(layers=[1, 3], keep_ratio=0),
    "mixed": OrthoRankConfig(layers=[1, 4], keep_ratio=0.5, keep_ratios={4: 0.0}),
}
PROMPTS = [Prompt("The river is wide and the bridge is old"), Prompt("x"), Prompt("Boats left the harbour")]


@pytest.fixture(scope="module")
def byte_model(tiny_folder: Path) -> tuple[Any, Any]:
    from orthorank.models import load_model

    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    return model, tokenizer


def steps(model: Any, ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Log-probabilities that ``generate()`` has of each token of ``answer``: what it is made to choose from."""
    given = iter(answer.tolist())

    def forced(_: Any, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, next(given)] = 0
        return chosen

    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=len(answer),
        do_sample=False,
        logits_processor=[forced],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(found.logits).double().log_softmax(-1)


@pytest.mark.parametrize("name", PLANS)
def test_it_is_what_generate_gives(byte_model: tuple[Any, Any], name: str) -> None:
    """Answers, KL divergences and losses from `generate()` itself, made to follow the dense answer."""
    model, tokenizer = byte_model
    found = compare_plans(model, tokenizer, {name: PLANS[name]}, PROMPTS, max_new_tokens=7)
    rises = []
    for prompt, row in zip(PROMPTS, found["prompts"], strict=True):
        ids = torch.tensor([tokenizer(prompt.text)["input_ids"]])
        answer = model.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]
        dense = steps(model, ids, answer)
        with apply(model, PLANS[name]):
            own = model.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]
            logs = steps(model, ids, answer)
        kl = (dense.exp() * (dense - logs)).sum(-1)
        losses = [-each.gather(1, answer[:, None]).mean().item() for each in (dense, logs)]
        said = row["plans"][name]
        assert (row["tokens"], row["dense"]["tokens"]) == (ids.shape[1], 7)
        assert row["dense"]["answer"] == tokenizer.decode(answer)
        assert (said["answer"], said["same"]) == (tokenizer.decode(own), own.tolist() == answer.tolist())
        assert [row["dense"]["loss"], said["loss"]] == pytest.approx(losses, abs=1e-4)
        assert [said["next_kl"], said["answer_kl"]] == pytest.approx([kl[0].item(), kl.mean().item()], abs=1e-4)
        rises.append(said["loss"] - row["dense"]["loss"])
    rise = found["plans"][name]["rise"]
    error = torch.tensor(rises).std().item() / 3**0.5
    assert [rise["mean"], rise["standard_error"]] == pytest.approx([sum(rises) / 3, error], abs=1e-5)
    assert rise["most"] == pytest.approx(rise["mean"] + 2 * rise["standard_error"])
    assert found["plans"][name]["same"] == sum(row["plans"][name]["same"] for row in found["prompts"])
    assert max(row["plans"][name]["answer_kl"] for row in found["prompts"]) > 0.05, "the plan does something"
    assert handle_of(model) is None


def test_a_plan_that_leaves_nothing_out_is_the_dense_model(byte_model: tuple[Any, Any]) -> None:
    plans = {"all": OrthoRankConfig(layers=[2], keep_ratio=1.0)}
    found = compare_plans(*byte_model, plans, PROMPTS, max_new_tokens=3)["plans"]["all"]
    assert found["same"] == 3
    assert [found["next_kl"]["mean"], found["rise"]["mean"]] == pytest.approx([0, 0], abs=1e-6)


def test_maps_are_applied(byte_model: tuple[Any, Any]) -> None:
    plain = PLANS["layer pruning"]
    corrected = OrthoRankConfig(layers=[1, 3], keep_ratio=0, correction=maps([1, 3]))
    found = compare_plans(*byte_model, {"plain": plain, "corrected": corrected}, PROMPTS, max_new_tokens=2)["plans"]
    assert found["plain"]["answer_kl"]["mean"] != pytest.approx(found["corrected"]["answer_kl"]["mean"], abs=1e-3)


def test_it_goes_on_where_it_stopped(
    byte_model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are kept are not computed again, if they are of the same prompt, plans and settings."""
    real, asked = compare._row, []

    def counted(model: Any, tokenizer: Any, plans: Any, ids: list[int], longest: int) -> Any:
        asked.append(len(ids))
        return real(model, tokenizer, plans, ids, longest)

    monkeypatch.setattr(compare, "_row", counted)
    file = tmp_path / "state.jsonl"
    whole = compare_plans(*byte_model, PLANS, PROMPTS, max_new_tokens=2, kept=file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:30])  # killed while it wrote the third
    assert compare_plans(*byte_model, PLANS, PROMPTS, max_new_tokens=2, kept=file) == json.loads(json.dumps(whole))
    assert asked == [39, 1, 22, 22]
    others = PLANS | {"mixed": OrthoRankConfig(layers=[1, 4], keep_ratio=0.5)}
    compare_plans(*byte_model, others, PROMPTS[:1], max_new_tokens=2, kept=file)
    compare_plans(*byte_model, PLANS, PROMPTS[:1], max_new_tokens=3, kept=file)
    assert asked == [39, 1, 22, 22, 39, 39]
    file.write_text('{"key": "a", "row": 5}\n')
    with pytest.raises(OrthoRankError, match="is no file of answers"):
        compare_plans(*byte_model, PLANS, PROMPTS, kept=file)


def test_another_configuration_is_answered_anew(
    byte_model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of earlier versions, which do not say of which one they are, are found as before."""
    model, tokenizer = byte_model
    answered: list[list[int]] = []
    own = {"next_kl": 0.0, "answer_kl": 0.0, "loss": 0.0, "same": True}

    def row(*given: Any) -> dict[str, Any]:
        answered.append(given[3])
        return {"dense": {"loss": 0.0}, "plans": {"layer pruning": own}}

    monkeypatch.setattr(compare, "_row", row)
    plans = {"layer pruning": PLANS["layer pruning"]}

    def run(file: str) -> int:
        compare_plans(model, tokenizer, plans, PROMPTS[:1], kept=tmp_path / file)
        return len(answered)

    assert (run("new"), run("new")) == (1, 1)
    monkeypatch.setattr(model.config, "rms_norm_eps", 0.1)
    assert (run("new"), run("new")) == (2, 2)
    with monkeypatch.context() as earlier:
        earlier.setattr(compare, "owner_of", lambda *given: as_before(owner_of(*given)))
        assert run("old") == 3
    assert run("old") == 3


def test_prompts_are_lines_or_json_lines(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": " as it is\n"}) + "\n\n" + json.dumps({"messages": messages}))
    first, second = read_prompts(file)
    assert first == Prompt(" as it is\n")
    assert second == Prompt("user: Hi\nassistant: Yes?", tuple(messages))
    assert read_prompts(file.rename(tmp_path / "prompts.txt")) == [first, second], "it begins with {"
    file.write_text("a\u2028b\r\n  \nc")
    with pytest.raises(OrthoRankError, match=r"line 1 of .*prompts.jsonl' is broken JSON: Expecting value"):
        read_prompts(file)
    assert read_prompts(file.rename(tmp_path / "prompts")) == [Prompt("a\u2028b"), Prompt("c")]


def test_lines_of_json_that_are_no_prompts(tmp_path: Path) -> None:
    """Each is said as what it is; a sample leaves them out, and draws among the others."""
    file = tmp_path / "log.jsonl"
    odd = {
        '{"prompt": "a"': "line 1 of .* is broken JSON: Expecting",
        '{"prompt": "\\ud800 a"}': r"line 1 of .* has half of a character, '\\ud800'",
        '{"messages": [{"role": "user", "content": "\\ud800"}]}': "has half of a character",
        '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}': "not with both",
        '{"body": {"prompt": "a", "messages": []}}': "not with both",
    }
    for line, words in odd.items():
        file.write_text(line)
        for sample in (None, 3):
            with pytest.raises(OrthoRankError, match=words):
                read_prompts(file, sample)
    good = [json.dumps({"prompt": f"{n}"}) for n in range(20)]
    file.write_text("\n".join(good))
    some = read_prompts(file, 5)
    file.write_text("\n".join([*odd, *good]))
    assert sample_prompts(file, 5) == (some, 5)
    for content in ('[{"prompt": "a"}]', '[\n{"prompt": "a"}]', "[]"):
        file.write_text(content)
        with pytest.raises(OrthoRankError, match="begins a JSON array; give JSON lines"):
            read_prompts(file.rename(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_text("[INST] Hi [/INST]")
    assert read_prompts(tmp_path / "prompts.txt") == [Prompt("[INST] Hi [/INST]")]


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    """Editors on Windows write one before prompts, texts, plans and configurations."""
    from orthorank.common.texts import find_text

    for name, content in (("lines.jsonl", '{"prompt": "a"}'), ("begun", '{"prompt": "a"}'), ("plain.txt", "a")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_prompts(tmp_path / name) == [Prompt("a")]
    assert find_text(tmp_path / "plain.txt").content == "a"
    plan = OrthoRankConfig(layers=[1])
    file = plan.save_pretrained(tmp_path / "plan")
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert OrthoRankConfig.from_pretrained(file) == plan


def test_prompts_of_a_log_of_requests(tmp_path: Path) -> None:
    """Lines of a server's log, and the same few of many each time."""
    file = tmp_path / "log.jsonl"
    bodies = [{"prompt": [5, 6], "max_tokens": 3}, {"messages": [{"role": "user", "content": "Hi"}], "stream": True}]
    file.write_text("".join(json.dumps({"id": n, "url": "/v1", "body": body}) + "\n" for n, body in enumerate(bodies)))
    ids, chat = read_prompts(file)
    assert (ids.tokens, ids.ids(None), chat.messages[0]["content"]) == ((5, 6), [5, 6], "Hi")
    file.write_text("\n".join(json.dumps({"prompt": f"{n}"}) for n in range(50)))
    some = [int(prompt.text) for prompt in read_prompts(file, 8)]
    assert some == sorted(set(some)) == [int(prompt.text) for prompt in read_prompts(file, 8)]
    assert (len(some), len(read_prompts(file, 60))) == (8, 50)
    with pytest.raises(OrthoRankError, match="sample is 0"):
        read_prompts(file, 0)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": ""}',
        '{"prompt": 5}',
        '{"prompt": []}',
        '{"prompt": [5, "a"]}',
        '{"body": "a"}',
        "[]",
        '{"text": "a"}',
        '{"messages": []}',
        '{"messages": ["a"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": ["a"]}]}',
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "a"',
        "[" * 100000,
    ],
)
def test_what_is_no_prompt(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(OrthoRankError, match=r"line 2 of .* is (no prompt|broken JSON)"):
        read_prompts(file)


def test_messages_go_through_the_chat_template(byte_model: tuple[Any, Any]) -> None:
    _, tokenizer = byte_model
    prompt = Prompt("user: abc", ({"role": "user", "content": "abc"},))
    with pytest.raises(OrthoRankError, match="the tokenizer has no chat template"):
        prompt.ids(tokenizer)
    refuses = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    tokenizer.chat_template = refuses + "<{{ messages[0]['content'] }}>{% if add_generation_prompt %}:{% endif %}"
    try:
        assert tokenizer.decode(prompt.ids(tokenizer)) == "<abc>:"
        with pytest.raises(OrthoRankError, match="refuses the messages 'no': not this"):
            Prompt("no", ({"role": "user", "content": "no"},)).ids(tokenizer)
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plans": {}}, "plans is empty"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [Prompt("")]}, "prompt 1 has no token"),
        (
            {"prompts": [Prompt("a", tokens=(5, 10**30))]},
            f"prompt 1 has the token id {10**30}, and the model's vocabulary",
        ),
        ({"prompts": [Prompt("a"), Prompt("b", tokens=(-1,))]}, "prompt 2 has the token id -1"),
        ({"prompts": [Prompt("a"), Prompt("b" * 511)]}, "prompt 2 has 511 tokens.* more than the 512"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"plans": {"a": OrthoRankConfig(layers=[9])}}, "9"),
        ({"bos": "first"}, "the tokenizer has no BOS token"),
    ],
)
def test_what_is_refused(byte_model: tuple[Any, Any], changes: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"plans": PLANS, "prompts": PROMPTS, "max_new_tokens": 2} | changes
    with pytest.raises(OrthoRankError, match=words):
        compare_plans(*byte_model, **given)
