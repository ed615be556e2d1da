"""LongBench: prompts, cuts and scores by its conventions. The expected scores are worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import orthorank
from orthorank.cli import main
from orthorank.common.errors import OrthoRankError
from orthorank.evaluation import longbench, longbench_run
from orthorank.evaluation.longbench import TASKS, Question, local_questions, prompt_ids, score, summary
from orthorank.evaluation.longbench_run import run_longbench

pytestmark = pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher")


def ask(task: str, *answers: str, classes: tuple[str, ...] = ()) -> Question:
    return Question(task, 0, "a prompt", answers, classes)


@pytest.mark.parametrize(
    ("question", "prediction", "expected"),
    [
        # F1 of words, without case, punctuation and articles: common {cat, sat}: 2/3 of 3, 2/2 of 2: 0.8
        (ask("qasper", "The cat sat."), "a CAT sat down", 0.8),
        (ask("qasper", "dog", "The cat sat."), "the cat sat", 1.0),  # the best of the right answers
        (ask("hotpotqa", "yes"), "no", 0.0),
        # triviaqa: the first line only, after leading line ends
        (ask("triviaqa", "Paris"), "\nParis\nQuestion: another one", 1.0),
        (ask("qasper", "Paris"), "\nParis\nlong line", 0.5),  # not so here: 1 of 3 words, 1 of 1
        # classes named in the answer share the point; a class that is part of the right one does not count
        (ask("trec", "Individual", classes=("Individual", "City")), "Individual or City", 0.5),
        (ask("trec", "Food group", classes=("Food", "Food group")), "Food group", 1.0),
        (ask("trec", "City", classes=("Individual", "City")), "Country", 0.0),
        # numbers in the answer: one of two is right
        (ask("passage_count", "7"), "There are 7, or 12", 0.5),
        (ask("passage_count", "7"), "none", 0.0),
        (ask("passage_retrieval_en", "Paragraph 3"), "Paragraph 3", 1.0),
        # code: the first line without a comment mark; 10 letters of 11 and of 10 agree: 2 * 10 / 21 = 0.95
        (ask("lcc", "return a+b"), "# comment\nreturn a+b;\nmore", 0.95),
        # longest common subsequence of words: 2 of 2 and 2 of 4: F 0.667
        (ask("gov_report", "the old house fell"), "old house", 2 / 3),
        (ask("samsum", "old house"), "old house\nsecond line", 1.0),
    ],
)
def test_scores(question: Question, prediction: str, expected: float) -> None:
    assert score(question, prediction) == pytest.approx(expected, abs=1e-6)


def test_the_tasks_are_longbenchs() -> None:
    assert len(TASKS) == 16
    assert {name for name, task in TASKS.items() if not task.chat} == {
        "trec",
        "triviaqa",
        "samsum",
        "lcc",
        "repobench-p",
    }
    assert {name for name, task in TASKS.items() if task.first_line} == {"trec", "triviaqa", "samsum"}
    assert len({task.group for task in TASKS.values()}) == 6


@pytest.mark.usefixtures("harness")
def test_templates_and_lengths_agree_with_the_harness() -> None:
    """The harness carries LongBench's templates and lengths; ours are read from it, or equal to its."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    for name, task in TASKS.items():
        entry: Any = index[f"longbench_{name}"]
        assert entry.cfg["generation_kwargs"]["max_gen_toks"] == task.max_new_tokens, name
        assert task.metric in entry.cfg["process_results"] or task.metric.removesuffix("_score") in str(
            entry.cfg["process_results"]
        )
    row = {"context": "CONTEXT", "question": "QUESTION", "answers": ["A"]}
    prompt = longbench.hub_template("hotpotqa")(row)
    assert prompt.index("CONTEXT") < prompt.index("QUESTION")
    assert prompt.endswith("Answer:")


@pytest.fixture
def byte_model(tiny_folder: Path) -> tuple[Any, Any]:
    from orthorank.models import load_model

    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    return model, tokenizer


def test_a_long_prompt_loses_its_middle(byte_model: tuple[Any, Any]) -> None:
    _, tokenizer = byte_model
    question = Question("lcc", 0, "0123456789abcdef", ("x",))
    assert tokenizer.decode(prompt_ids(question, tokenizer, 16)) == "0123456789abcdef"
    assert tokenizer.decode(prompt_ids(question, tokenizer, 6)) == "012def"


def test_the_chat_template_is_for_some_tasks(byte_model: tuple[Any, Any]) -> None:
    _, tokenizer = byte_model
    tokenizer.chat_template = "<{{ messages[0]['content'] }}>{% if add_generation_prompt %}:{% endif %}"
    assert tokenizer.decode(prompt_ids(Question("qasper", 0, "abc", ("x",)), tokenizer, 100)) == "<abc>:"
    assert tokenizer.decode(prompt_ids(Question("trec", 0, "abc", ("x",)), tokenizer, 100)) == "abc"


def test_answers_are_greedy_and_cut_to_the_tasks_length(byte_model: tuple[Any, Any]) -> None:
    model, tokenizer = byte_model
    question = Question("triviaqa", 0, "What is it?", ("x",))
    ids = torch.tensor([tokenizer("What is it?")["input_ids"]])
    wanted = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    assert longbench.answer(model, tokenizer, question) == tokenizer.decode(wanted, skip_special_tokens=True)
    with pytest.raises(OrthoRankError, match="max_tokens is 30, and answers of triviaqa take 32"):
        longbench.answer(model, tokenizer, question, max_tokens=30)


def test_a_run_continues_where_it_stopped(
    byte_model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = byte_model
    questions = [Question("lcc", n, f"line {n}", ("x", "y")) for n in range(3)]
    asked: list[int] = []
    real = longbench_run.answer

    def counted(model: Any, tokenizer: Any, question: Question, *how: Any) -> str:
        asked.append(question.index)
        return real(model, tokenizer, question, *how)

    monkeypatch.setattr(longbench_run, "answer", counted)
    file = tmp_path / "answers.jsonl"
    whole = run_longbench(model, tokenizer, questions, answers=file)
    assert asked == [0, 1, 2]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    assert run_longbench(model, tokenizer, questions, answers=file) == whole
    assert asked == [0, 1, 2, 2]
    assert file.read_text().splitlines(keepends=True) == lines
    run_longbench(model, tokenizer, questions, answers=file, identity="another plan")
    assert asked == [0, 1, 2, 2, 0, 1, 2], "answers of another plan are not these"
    run_longbench(model, tokenizer, questions, answers=file, identity="newer", before="another plan")
    assert asked == [0, 1, 2, 2, 0, 1, 2], "as an earlier version called them"
    file.write_text("nonsense\n")
    with pytest.raises(OrthoRankError, match="is no file of answers"):
        run_longbench(model, tokenizer, questions, answers=file)


def test_summary() -> None:
    found = summary({"trec": [1.0, 0.0], "samsum": [1.0], "lcc": [0.2]})
    assert found["tasks"] == {"trec": 50.0, "samsum": 100.0, "lcc": 20.0}
    assert found["groups"] == {"few-shot": 75.0, "code": 20.0}
    assert found["mean"] == pytest.approx(170 / 3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", "line 1 of .* is no question"),
        ('{"task": "imdb", "prompt": "a", "gold": ["b"]}', "of task 'imdb'"),
        ('{"task": "lcc", "prompt": "", "gold": ["b"]}', "needs a prompt"),
        ('{"task": "lcc", "prompt": "a", "gold": []}', "at least one right answer"),
        ("", "holds no questions"),
    ],
)
def test_local_files_say_what_is_wrong(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(OrthoRankError, match=words):
        local_questions(file)


def test_a_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(OrthoRankError, match=r"^data '[^']*nosuch' cannot be read: No such file or directory$"):
        local_questions(tmp_path / "nosuch")


def test_a_line_ends_at_its_newline_alone(tmp_path: Path) -> None:
    """JSON may hold characters that Python, too, takes for ends of lines."""
    rows = [{"task": "lcc", "idx": n, "prompt": f"a\u2028b\x85c {n}", "gold": ["x"]} for n in range(2)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "data.jsonl").write_bytes(text.encode())
    assert [q.prompt for q in local_questions(tmp_path / "data.jsonl")] == [row["prompt"] for row in rows]


def test_trecs_classes_are_those_of_its_examples(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    prompt = "Question: Who?\nType: Individual\nQuestion: Where?\nType: City\nQuestion: What?\nType:"
    file.write_text(json.dumps({"task": "trec", "idx": 4, "prompt": prompt, "gold": ["Food"]}))
    (question,) = local_questions(file)
    assert question.classes == ("City", "Food", "Individual")
    assert question.index == 4


def test_labels_beside_the_answers(tmp_path: Path) -> None:
    """As MiniLongBench has trec: the labels are no answers."""
    gold = {"answers": ["Food"], "all_classes": ["Food", "City"]}
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"task": "trec", "idx": 1, "prompt": "Type:", "gold": gold}))
    (question,) = local_questions(file)
    assert (question.answers, question.classes) == (("Food",), ("Food", "City"))
    file.write_text(json.dumps({"task": "trec", "prompt": "Type:", "gold": {"labels": ["Food"]}}))
    with pytest.raises(orthorank.OrthoRankError, match=r"line 1 .* is no question"):
        local_questions(file)


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"task": task, "idx": n, "prompt": "some text " * 3, "gold": ["x"]} for n, task in enumerate(["lcc"] * 3)]
    data.write_text("\n".join(map(json.dumps, rows)))
    plan = orthorank.OrthoRankConfig(layers=[2, 3], keep_ratio=0.5).save_pretrained(tmp_path)
    options = ["--data", str(data), "--plan", str(plan), "--device", "cpu", "--limit", "2"]
    assert main(["eval", "longbench", str(tiny_folder), *options, "--output", str(tmp_path / "out")]) == 0
    assert "mean of the tasks" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "longbench.json").read_text())
    assert written["scores"]["questions"] == {"lcc": 2}
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 2
    assert main(["eval", "longbench", str(tiny_folder), *options, "--tasks", "imdb"]) == 2
    assert "task is 'imdb'" in capsys.readouterr().err


def test_prompts_that_are_all_too_long_are_said(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"task": "lcc", "prompt": "some text", "gold": ["x"]}))
    options = ["--data", str(tmp_path / "data.jsonl"), "--only-shorter", "5", "--output", str(tmp_path / "out")]
    assert main(["eval", "longbench", str(tiny_folder), "--device", "cpu", *options]) == 2
    assert "only_shorter is 5" in capsys.readouterr().err
