"""Calibration text from WikiText-2 and C4, read from folders: which rows, how joined, how cut; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankError
from orthorank.common.datasets import dataset_texts
from orthorank.models import load_model
from orthorank.search import run_search
from tests.orthorank.search_runs import plan_in, settings


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for WikiText-2 in the layout that ``save_to_disk`` writes: lines, many of them empty."""
    import datasets

    lines = ["" if i % 3 == 0 else f" line {i} of the text , with words that nobody reads . \n" for i in range(400)]
    folder = tmp_path_factory.mktemp("datasets") / "wikitext"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": lines})}).save_to_disk(folder)
    return folder


def test_the_text_of_wikitext2_is_sleb_s(wikitext: Path) -> None:
    import datasets

    rows = datasets.load_from_disk(str(wikitext))["train"].shuffle(seed=0)
    text, held_out = dataset_texts(f"wikitext2:{wikitext}")
    assert text.content == "\n\n".join(rows[:128]["text"])
    assert text.name.startswith("WikiText-2 (raw) train, shuffle(seed=0), rows 0 to 127 joined by a blank line (from ")
    assert held_out is not None
    assert held_out.content == "\n\n".join(rows[128:256]["text"])


def test_a_search_on_wikitext2(wikitext: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """One tokenisation, windows one after another, the tail dropped; which text it was is in the plan."""
    options: dict[str, Any] = {"dataset": f"wikitext2:{wikitext}", "windows": None, "window": None}
    run_search(settings(tiny_folder, tmp_path / "default", layers=1, **options))
    _, tokenizer, info = load_model(str(tiny_folder), device="cpu")
    text = dataset_texts(f"wikitext2:{wikitext}")[0]
    ids = torch.tensor(tokenizer(text.content)["input_ids"])
    record = plan_in(tmp_path / "default")["calibration"]
    assert info.max_tokens == 512, "shorter than the recipe's 2048"
    assert (record["seq_len"], record["windows"]) == (512, len(ids) // 512)
    assert record["windows"] > 4
    assert record["text"] == text.name
    assert record["text_sha256"] == text.sha256
    from orthorank.evaluation import perplexity

    model, _, _ = load_model(str(tiny_folder), device="cpu")
    assert record["ids_sha256"] == perplexity(model, ids, window=512).ids_sha256
    assert "rows 128 to 255" in plan_in(tmp_path / "default")["measured"]["text"]
    with pytest.raises(OrthoRankError, match=r"which fill \d+ windows of 32; lower --windows or --window"):
        run_search(settings(tiny_folder, tmp_path / "b", dataset=options["dataset"], windows=100000))


def test_c4_from_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)))
    text, held_out = dataset_texts(f"c4:{tmp_path}")
    assert text.content == " ".join(f"document {i}" for i in range(128))
    assert text.name.startswith("C4 (en) train, shard 0, documents 0 to 127 joined by a space")
    assert held_out is not None
    assert held_out.content == " ".join(f"document {i}" for i in range(128, 200))


def test_a_dataset_with_nothing_left_has_no_held_out_part(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(128)))
    output = tmp_path / "out"
    results = run_search(settings(tiny_folder, output, dataset=f"c4:{tmp_path}", method="influence", protect_first=1))
    assert [row["perplexity"] for row in results["rows"]] == [None, None]
    assert "perplexity" not in plan_in(output)["measured"]


def test_datasets_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    with pytest.raises(OrthoRankError, match=r"dataset is 'imdb'; it may be wikitext2 or c4, .*with --text"):
        dataset_texts("imdb")
    with pytest.raises(OrthoRankError, match=r"there is no folder './nowhere'"):
        dataset_texts("wikitext2:./nowhere")
    (tmp_path / "train.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(OrthoRankError, match="has no 'text'; its split train needs a column text"):
        dataset_texts(f"c4:{tmp_path}")
    (tmp_path / "train.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(OrthoRankError, match="has no text in its first 128 rows"):
        dataset_texts(f"c4:{tmp_path}")
    (tmp_path / "train.jsonl").write_text("{")
    with pytest.raises(OrthoRankError, match=r"cannot be loaded: .*; check the folder"):
        dataset_texts(f"c4:{tmp_path}")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    remedy = r"'wikitext2' cannot be loaded: .*name a local copy \(wikitext2:FOLDER\) or a text file \(--text\)"
    with pytest.raises(OrthoRankError, match=remedy):
        dataset_texts("wikitext2")
    monkeypatch.setattr("orthorank.common.datasets.find_spec", lambda name: None)
    with pytest.raises(OrthoRankError, match=r"pip install '.\[eval\]' in a checkout of .*, or name a text file"):
        dataset_texts("wikitext2")
