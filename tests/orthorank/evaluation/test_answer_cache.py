"""The harness's cache of answers: a file serves the model and plan that filled it, and nobody else."""

from pathlib import Path
from typing import Any

import pytest

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.evaluation.tasks import OrthoRankLM

PLAN = OrthoRankConfig(layers=[2, 3, 4], keep_ratio=0.3)
REQUESTS = ("the river is wide and the old stone bridge holds", " well today")


@pytest.fixture
def model(tiny_folder: Path) -> tuple[Any, Any]:
    from orthorank.models import load_model

    loaded, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    tokenizer.eos_token = "!"
    return loaded, tokenizer


def answers(model: tuple[Any, Any], file: Path, plan: Any, **settings: Any) -> list[float]:
    """Log-likelihoods through the cache ``file``; the plan is removed afterwards."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM

    own = OrthoRankLM(model[0], tokenizer=model[1], plan=plan, **settings)
    try:
        cached = CachingLM(own, str(file))
        request = Instance(request_type="loglikelihood", doc={}, arguments=REQUESTS, idx=0)
        return [value for value, _ in cached.loglikelihood([request])]
    finally:
        if own.handle is not None:
            own.handle.remove()


def test_answers_of_the_dense_model_are_not_the_plans(model: tuple[Any, Any], tmp_path: Path) -> None:
    dense = answers(model, tmp_path / "a.db", None)
    assert answers(model, tmp_path / "a.db", None) == dense, "the same model finds its own"
    with pytest.raises(OrthoRankError) as raised:
        answers(model, tmp_path / "a.db", PLAN)
    said = str(raised.value)
    assert "dense, and this is" in said, "both are named"
    assert "with a plan (layers [2, 3, 4], keep_ratio 0.3, topk): they differ in plan; name another file" in said
    planned = answers(model, tmp_path / "b.db", PLAN)
    assert abs(planned[0] - dense[0]) > 1e-3
    assert answers(model, tmp_path / "b.db", PLAN) == planned
    with pytest.raises(OrthoRankError, match="they differ in plan"):
        answers(model, tmp_path / "b.db", None)


@pytest.mark.parametrize(
    ("plan", "settings", "words"),
    [
        (OrthoRankConfig(layers=[2, 3], keep_ratio=0.3), {}, "differ in plan"),
        (OrthoRankConfig(layers=[2, 3, 4], keep_ratio=0.3, criterion="inverse"), {}, "differ in plan"),
        (PLAN, {"context_only": True}, "context_only: they differ in context_only"),
        (PLAN, {"max_length": 64}, "differ in max_length"),
        (PLAN, {"add_bos_token": False}, "differ in add_bos_token"),
    ],
)
def test_what_else_answers_depend_on(
    model: tuple[Any, Any], tmp_path: Path, plan: Any, settings: dict[str, Any], words: str
) -> None:
    answers(model, tmp_path / "a.db", PLAN)
    with pytest.raises(OrthoRankError, match=words):
        answers(model, tmp_path / "a.db", plan, **settings)


def test_other_weights_of_one_name(model: tuple[Any, Any], tmp_path: Path) -> None:
    answers(model, tmp_path / "a.db", PLAN)
    model[0].model.layers[0].mlp.up_proj.weight.data *= 1.5
    with pytest.raises(OrthoRankError, match="differ in weights"):
        answers(model, tmp_path / "a.db", PLAN)


def test_what_a_plan_records_of_itself_does_not_matter(model: tuple[Any, Any], tmp_path: Path) -> None:
    found = answers(model, tmp_path / "a.db", PLAN)
    told = OrthoRankConfig(layers=[2, 3, 4], keep_ratio=0.3, measured={"perplexity": 3.0})
    assert answers(model, tmp_path / "a.db", told) == found


def test_a_file_that_does_not_say_whose_it_is(model: tuple[Any, Any], tmp_path: Path) -> None:
    """The harness's own model fills it without a word."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM
    from lm_eval.models.huggingface import HFLM

    stock = CachingLM(HFLM(model[0], tokenizer=model[1]), str(tmp_path / "a.db"))
    stock.loglikelihood([Instance(request_type="loglikelihood", doc={}, arguments=REQUESTS, idx=0)])
    with pytest.raises(OrthoRankError, match="has 1 answers and does not say of which model and plan"):
        answers(model, tmp_path / "a.db", PLAN)


@pytest.mark.usefixtures("harness")
def test_through_the_harness_own_evaluation(model: tuple[Any, Any], tmp_path: Path) -> None:
    """As ``orthorank lm-eval run --use_cache FILE`` goes: a plan is refused before anything is scored."""
    import json

    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"q": "the old bridge", "choices": [" holds", " well"], "label": 0}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "one.yaml").write_text(
        f"""task: one_bridge
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    manager = TaskManager(include_path=str(tmp_path))

    def run(plan: Any) -> Any:
        own = OrthoRankLM(model[0], tokenizer=model[1], plan=plan)
        try:
            return lm_eval.simple_evaluate(
                model=own, tasks=["one_bridge"], task_manager=manager, use_cache=str(tmp_path / "cache")
            )
        finally:
            if own.handle is not None:
                own.handle.remove()

    assert run(None)["results"]["one_bridge"]
    with pytest.raises(OrthoRankError, match="they differ in plan"):
        run(PLAN)


def test_answers_to_longbench_are_of_the_weights(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kind: answers that are kept in the output folder are found again for the same weights alone."""
    import shutil

    import torch
    from transformers import AutoTokenizer

    from orthorank.cli import main
    from orthorank.models import load_model

    pytest.importorskip("rouge")
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(folder)
    import json

    (tmp_path / "q.jsonl").write_text(json.dumps({"task": "lcc", "prompt": "def f(x):", "gold": ["return x"]}))
    monkeypatch.chdir(tmp_path)

    def kept() -> int:
        return len((tmp_path / "out" / "answers.jsonl").read_text().splitlines())

    command = ["eval", "longbench", str(folder), "--data", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "out")]
    assert main(command) == main(command) == 0
    assert kept() == 1, "the second run finds the answer of the first"
    model, _, _ = load_model(str(folder), device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(folder)
    assert main(command) == 0
    assert kept() == 2, "other weights in the same folder answer for themselves"
    assert main([*command, "--bos", "none"]) == 0
    assert kept() == 3, "and so do prompts of another BOS policy"
    capsys.readouterr()


def test_a_configuration_counts_by_what_it_computes() -> None:
    """Not by where it is from; what says nothing of one, of an earlier version, fits all."""
    from orthorank.evaluation.answer_cache import OWNER, claim, owner_of
    from orthorank.stack.layers import config_fingerprint
    from tests.orthorank.models import plain

    model = plain("llama")
    before, owner = config_fingerprint(model), owner_of(model, None, False, {})
    model.config.update({"_name_or_path": "elsewhere", "transformers_version": "9", "architectures": ["Other"]})
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=0)):
        assert config_fingerprint(model) == before
    for name, value in (("rms_norm_eps", 0.1), ("rope_parameters", {"rope_type": "default", "rope_theta": 3.0})):
        was = getattr(model.config, name)
        setattr(model.config, name, value)
        assert config_fingerprint(model) != before
        if name == "rms_norm_eps":
            other = owner_of(model, None, False, {}) | {"model": owner["model"]}
            with pytest.raises(OrthoRankError, match="they differ in config"):
                claim({OWNER: owner}, other, "a.db")
            claim({OWNER: {key: said for key, said in owner.items() if key != "config"}}, other, "a.db")
        setattr(model.config, name, was)
    assert config_fingerprint(model) == before
