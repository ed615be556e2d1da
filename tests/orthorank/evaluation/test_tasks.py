"""lm-evaluation-harness with a plan: true lengths, the stock backend's figures without one, and the command lines."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import orthorank
from orthorank.cli import main
from orthorank.common.errors import OrthoRankError
from orthorank.evaluation import task_scores
from orthorank.evaluation.task_scores import evaluate_tasks, paper_mean, task_differences

pytestmark = pytest.mark.usefixtures("harness")
PLAN = orthorank.OrthoRankConfig(layers=[2, 3, 4], keep_ratio=0.3)
WORDS = ["the", "river", "is", "wide", "and", "the", "old", "stone", "bridge", "holds", "well", "today"]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of multiple choice with questions and answers of many lengths, as a file of the harness."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "q": " ".join(WORDS[: 2 + n]),
            "choices": [" ".join(WORDS[n % 5 : n % 5 + m]) for m in (1, 3, 5)],
            "label": n % 3,
        }
        for n in range(8)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rivers.yaml").write_text(
        f"""task: rivers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer that has an EOS token: the harness needs one."""
    from transformers import AutoTokenizer

    copied = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_folder, copied)
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(copied)
    return copied


@pytest.fixture
def byte_model(folder: Path) -> tuple[Any, Any]:
    from orthorank.models import load_model

    model, tokenizer, _ = load_model(str(folder), device="cpu")
    return model, tokenizer


def pairs() -> list[tuple[None, list[int], list[int]]]:
    """Requests of many lengths, two with the same input among them."""
    seeded = torch.Generator().manual_seed(0)
    lengths = [(9, 3), (30, 1), (4, 8), (17, 2), (1, 1), (23, 5), (12, 12)]
    found = [
        (None, *(torch.randint(3, 200, (n,), generator=seeded).tolist() for n in (context, answer)))
        for context, answer in lengths
    ]
    return [*found, (None, found[1][1], [7])]


def adapter(byte_model: tuple[Any, Any], **settings: Any) -> Any:
    from orthorank.evaluation.tasks import OrthoRankLM

    return OrthoRankLM(byte_model[0], tokenizer=byte_model[1], **settings)


def test_results_do_not_depend_on_the_batch(byte_model: tuple[Any, Any]) -> None:
    found = []
    for size in (1, 3, 8):
        model = adapter(byte_model, plan=PLAN, batch_size=size)
        found.append([value for value, _ in model._loglikelihood_tokens(pairs(), disable_tqdm=True)])
        model.handle.remove()
    for values in found[1:]:
        assert values == pytest.approx(found[0], abs=1e-4)


def test_the_stock_backend_does_depend_on_it(byte_model: tuple[Any, Any]) -> None:
    """Why the adapter exists: without the lengths the pads are ranked among the tokens."""
    from lm_eval.models.huggingface import HFLM

    found = []
    with orthorank.apply(byte_model[0], PLAN):
        for size in (1, 8):
            model = HFLM(byte_model[0], tokenizer=byte_model[1], batch_size=size)
            found.append([value for value, _ in model._loglikelihood_tokens(pairs(), disable_tqdm=True)])
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) > 1e-2


def test_without_a_plan_it_is_the_stock_backend(byte_model: tuple[Any, Any]) -> None:
    from lm_eval.models.huggingface import HFLM

    stock = HFLM(byte_model[0], tokenizer=byte_model[1], batch_size=4)
    wanted = stock._loglikelihood_tokens(pairs(), disable_tqdm=True)
    found = adapter(byte_model, batch_size=4)._loglikelihood_tokens(pairs(), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_a_likelihood_is_that_of_a_plain_forward(byte_model: tuple[Any, Any]) -> None:
    model = adapter(byte_model, plan=PLAN, batch_size=8)
    found = model._loglikelihood_tokens(pairs(), disable_tqdm=True)
    for (_, context, answer), (value, _) in zip(pairs(), found, strict=True):
        ids = torch.tensor([context + answer])
        logits = byte_model[0](ids[:, :-1]).logits[0, -len(answer) :].log_softmax(-1)
        assert value == pytest.approx(logits.gather(1, ids[0, -len(answer) :, None]).sum().item(), abs=1e-4)
    model.handle.remove()


def test_requests_with_one_input_share_a_forward(byte_model: tuple[Any, Any]) -> None:
    rows: list[int] = []
    byte_model[0].lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    adapter(byte_model, batch_size=8)._loglikelihood_tokens(pairs(), disable_tqdm=True)
    assert sum(rows) == len(pairs()) - 1


def test_how_often_the_last_token_is_selected(byte_model: tuple[Any, Any]) -> None:
    """Counted again from what the layers select, row by row."""
    model = adapter(byte_model, plan=PLAN, batch_size=8)
    model._loglikelihood_tokens(pairs(), disable_tqdm=True)
    hits: list[bool] = []
    with model.handle.watching(lambda layer, positions, call: hits.append(call.tokens - 1 in positions[0].tolist())):
        for tokens in {model._input_of(context, answer) for _, context, answer in pairs()}:
            byte_model[0](torch.tensor([tokens]))
    assert model.last_tokens.share == pytest.approx(sum(hits) / len(hits))
    assert len(hits) == 3 * (len(pairs()) - 1)
    model.handle.remove()


def test_short_rows_do_not_change_how_often_that_is(byte_model: tuple[Any, Any]) -> None:
    """Whatever they share a batch with."""
    lengths = sorted(len(context) + len(answer) for _, context, answer in pairs())
    plan = dataclasses.replace(PLAN, min_prompt=lengths[len(lengths) // 2])
    shares = []
    for size in (1, 8):
        model = adapter(byte_model, plan=plan, batch_size=size)
        model._loglikelihood_tokens(pairs(), disable_tqdm=True)
        shares.append(model.last_tokens.share)
        model.handle.remove()
    assert shares[0] == shares[1] is not None


def test_tasks_of_ones_own(byte_model: tuple[Any, Any], task_folder: Path) -> None:
    model, tokenizer = byte_model
    dense = evaluate_tasks(model, tokenizer, ["rivers"], include_path=task_folder)
    found = [
        evaluate_tasks(model, tokenizer, ["rivers"], plan=PLAN, include_path=task_folder, batch_size=size)
        for size in (1, 8)
    ]
    assert found[0]["mean"] == found[1]["mean"]
    assert found[0]["plan"]["layers"] == [2, 3, 4]
    assert dense["plan"] is None
    assert dense["last_token_selected"] is None
    assert 0 <= found[0]["last_token_selected"] <= 1
    (row,) = dense["tasks"]
    assert (row["task"], row["rows"], row["metric"]) == ("rivers", 8, "acc_norm")
    assert orthorank.handle_of(model) is None


def test_an_idle_layer_is_an_error(byte_model: tuple[Any, Any]) -> None:
    model = adapter(byte_model, plan=PLAN)
    with pytest.raises(OrthoRankError, match="layer 2 of the plan was never active"):
        model.check_active()
    model.handle.remove()


def test_a_tokenizer_without_bos_and_eos_is_refused(tiny_folder: Path) -> None:
    from orthorank.models import load_model

    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    with pytest.raises(OrthoRankError, match="neither a BOS nor an EOS token"):
        evaluate_tasks(model, tokenizer, ["piqa"], plan=PLAN)
    assert orthorank.handle_of(model) is None
    assert tokenizer.pad_token is None, "the caller's tokenizer is left as it was"


def test_mean_needs_accuracies() -> None:
    with pytest.raises(OrthoRankError, match="'squad' has no acc_norm and no acc"):
        paper_mean({"squad": {"f1,none": 0.3}})
    with pytest.raises(OrthoRankError, match="no task"):
        paper_mean({})


def test_the_command(folder: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = PLAN.save_pretrained(tmp_path)
    options = ["--tasks", "rivers", "--include-path", str(task_folder), "--device", "cpu", "--limit", "4"]
    output = tmp_path / "out"
    assert main(["eval", "tasks", str(folder), "--plan", str(plan), *options, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "rivers" in shown
    assert "last token" in shown
    assert json.loads((output / "tasks.json").read_text())["tasks"][0]["rows"] == 4
    assert main(["eval", "tasks", str(folder), "--tasks", "nothing", "--device", "cpu"]) == 2
    assert "tasks holds 'nothing'" in capsys.readouterr().err


def test_scores_of_rows_are_those_behind_the_accuracy(byte_model: tuple[Any, Any], task_folder: Path) -> None:
    model, tokenizer = byte_model
    found = evaluate_tasks(model, tokenizer, ["rivers"], plan=PLAN, include_path=task_folder, samples=True)
    (row,) = found["tasks"]
    assert len(row.pop("scores")) == row["rows"] == 8
    assert found == evaluate_tasks(model, tokenizer, ["rivers"], plan=PLAN, include_path=task_folder)


def test_several_plans_are_paired_with_the_dense_model(
    folder: Path,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each row's score of each plan from a run of its own, and the differences written down."""
    from orthorank.models import load_model

    removed = orthorank.OrthoRankConfig(layers=[1, 2, 3, 4], keep_ratio=0)
    files = [str(plan.save_pretrained(tmp_path / name)) for name, plan in (("a", PLAN), ("b", removed))]
    options = ["--tasks", "rivers", "--include-path", str(task_folder), "--device", "cpu"]
    line = ["eval", "tasks", str(folder), *options, "--plan", files[0], "--plan", files[1]]
    real, measured = task_scores.evaluate_tasks, []

    def interrupted(*given: Any, **how: Any) -> dict[str, Any]:
        measured.append(how["plan"])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(*given, **how)

    monkeypatch.setattr(task_scores, "evaluate_tasks", interrupted)
    assert main([*line, "--output", str(tmp_path / "out")]) == 2
    assert "the same command goes on there" in capsys.readouterr().err
    assert main([*line, "--output", str(tmp_path / "out")]) == 0
    assert len(measured) == 4, "the dense model and the first plan were kept"
    shown = " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["dense", "orthorank", "layer pruning"]
    model, tokenizer, _ = load_model(str(folder), device="cpu")
    scores = []
    for plan in (None, PLAN, removed):
        found = evaluate_tasks(model, tokenizer, ["rivers"], plan=plan, include_path=task_folder, samples=True)
        scores.append(torch.tensor(found["tasks"][0]["scores"]))
    assert [row["tasks"][0]["scores"] for row in written["rows"]] == [each.tolist() for each in scores]
    assert any(not torch.equal(scores[0], each) for each in scores[1:]), "there is a difference to see"
    for name, each in zip(("orthorank", "layer pruning"), scores[1:], strict=True):
        difference = each - scores[0]
        mean, error = difference.mean().item(), difference.std().item() / 8**0.5
        said = written["differences"][name]
        assert [said["tasks"][0]["mean"], said["mean"]] == pytest.approx([mean, mean], abs=1e-6)
        assert [said["tasks"][0]["standard_error"], said["standard_error"]] == pytest.approx([error, error], abs=1e-6)
        assert f"{100 * mean:+.2f} ± {100 * error:.2f}" in shown
    assert main([*line, "--no-dense", "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert (without["against"], list(without["differences"])) == ("orthorank", ["layer pruning"])


def test_a_changed_task_is_measured_again(
    folder: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, measured = shutil.copytree(task_folder, tmp_path / "tasks"), []
    real = task_scores.evaluate_tasks
    monkeypatch.setattr(task_scores, "evaluate_tasks", lambda *a, **how: (measured.append(1), real(*a, **how))[1])
    line = ["eval", "tasks", str(folder), "--tasks", "rivers", "--include-path", str(own), "--device", "cpu"]
    line += ["--limit", "2", "--output", str(tmp_path / "out")]
    assert [main(line), main(line)] == [0, 0]
    assert len(measured) == 1
    (task,) = own.glob("*.yaml")
    task.write_text(task.read_text() + "# of another kind\n")
    assert main(line) == 0
    assert len(measured) == 2, "the folder has the same path, and other tasks"


def test_differences_over_tasks() -> None:
    def of(*scores: list[float], metric: str = "acc") -> dict[str, Any]:
        return {"tasks": [{"task": str(n), "metric": metric, "scores": each} for n, each in enumerate(scores)]}

    found = task_differences(of([1, 0], [0, 0]), of([1, 1], [1, 1]))
    assert [each["mean"] for each in found["tasks"]] == [0.5, 1.0]
    assert (found["mean"], found["standard_error"]) == (0.75, pytest.approx(0.25))
    unknown = task_differences(of([1, 0], []), of([1, 1], []))
    assert (unknown["tasks"][1]["mean"], unknown["mean"]) == (None, None)
    assert task_differences(of([1.0]), of([1.0], metric="acc_norm"))["mean"] is None


@pytest.mark.slow
def test_the_harness_own_command_line(folder: Path, task_folder: Path, tmp_path: Path) -> None:
    plan = PLAN.save_pretrained(tmp_path)
    arguments = ["run", "--model", "orthorank", "--model_args", f"pretrained={folder},plan={plan}"]
    options = ["--tasks", "rivers", "--include_path", str(task_folder), "--limit", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "orthorank", "lm-eval", *arguments, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|rivers|" in done.stdout


def test_selection_over_the_context_alone(byte_model: tuple[Any, Any]) -> None:
    """An answer's tokens are dense: the likelihood is that of the prefilled context and dense steps over its cache."""
    from transformers import DynamicCache

    model = adapter(byte_model, plan=PLAN, batch_size=8, context_only=True)
    found = [value for value, _ in model._loglikelihood_tokens(pairs(), disable_tqdm=True)]
    for (_, context, answer), value in zip(pairs(), found, strict=True):
        cache = DynamicCache(config=byte_model[0].config)
        with torch.no_grad():
            logits = [byte_model[0](torch.tensor([context]), past_key_values=cache).logits[:, -1]]
            with model.handle.decoding():
                steps = [torch.tensor([[token]]) for token in answer[:-1]]
                logits += [byte_model[0](step, past_key_values=cache).logits[:, -1] for step in steps]
        scores = torch.cat(logits).log_softmax(-1)
        assert value == pytest.approx(scores.gather(1, torch.tensor(answer)[:, None]).sum().item(), abs=1e-4)
    model.handle.remove()
