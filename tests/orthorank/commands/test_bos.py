"""Models that need BOS: windows begin with it where the tokenizer adds one, and each command says what it did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.cli import main
from orthorank.common.texts import Bos, Text, adds_bos, take_samples, tokenize
from orthorank.evaluation import perplexity
from orthorank.models import load_model
from orthorank.stack.sink import detect_sink
from tests.orthorank.models import tiny

BOS_ID = 256
TEXT = "".join(f"Boat {n} left the harbour at {n % 24} o'clock, and {n * 7 % 31} came back. " for n in range(160))


def byte_tokenizer(adds: bool, folder: Path) -> Any:
    """Bytes and a BOS token, which a template puts before every text, as Gemma's and Llama's tokenizers do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary | {"<bos>": BOS_ID}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if adds:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS_ID)])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="!").save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def planted(name: str) -> Any:
    """A model in which BOS, and no other token, grows to an attention sink: in layer 1, by its MLP."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 4} if name.startswith("gemma-3") else {}
    model = tiny(name, vocab_size=260, num_hidden_layers=8, bos_token_id=BOS_ID, eos_token_id=0, **kinds)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 0  # the dimension that says that it is BOS
        embedding[BOS_ID] = 0
        embedding[BOS_ID, 0] = embedding.norm(dim=1).median()
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            if number != 1:
                layer.mlp.down_proj.weight.zero_()
                continue
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                weight.zero_()
                weight[:, 0] = 1.0
            layer.mlp.down_proj.weight.fill_(0.0)
            layer.mlp.down_proj.weight[1] = 5.0
            if name.startswith("gemma-3"):  # a norm behind the MLP sets its scale
                layer.post_feedforward_layernorm.weight.fill_(100.0)
    return model


@pytest.fixture(scope="module", params=["gemma-3", "llama-2"])
def needs_bos(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that needs BOS, and its tokenizer, which adds it."""
    folder = tmp_path_factory.mktemp(request.param)
    planted(request.param).save_pretrained(folder)
    byte_tokenizer(True, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "harbour.txt"
    file.write_text(TEXT)
    return file


def test_a_tokenizer_says_what_auto_is(tmp_path: Path) -> None:
    adds, plain = byte_tokenizer(True, tmp_path / "a"), byte_tokenizer(False, tmp_path / "b")
    assert (adds_bos(adds), adds_bos(plain)) == (True, False)
    assert [Bos.of(asked, adds).policy for asked in ("auto", "first", "every", "none")] == [
        "every",
        "first",
        "every",
        "none",
    ]
    assert [Bos.of(asked, plain).policy for asked in ("auto", "first", "every", "none")] == [
        "none",
        "first",
        "every",
        "none",
    ]
    assert str(Bos.of("auto", adds)) == (
        "every window begins with BOS, id 256 (auto: the tokenizer adds one by itself)"
    )
    assert str(Bos.of("auto", plain)) == "no BOS (auto: the tokenizer adds none by itself)"
    plain.bos_token = None
    with pytest.raises(OrthoRankError, match="bos is 'every' and the tokenizer has no BOS token"):
        Bos.of("every", plain)
    with pytest.raises(OrthoRankError, match="bos is 'twice'; it may be auto, first, every or none"):
        Bos.of("twice", adds)
    assert tokenize(Text("", "ab"), adds).tolist()[0] == BOS_ID, "as the tokenizer does it, unless told otherwise"
    assert BOS_ID not in tokenize(Text("", "ab"), adds, Bos.of("every", adds)).tolist()


def test_the_sink_is_found_with_bos_and_not_without(needs_bos: Path) -> None:
    model, tokenizer, _ = load_model(str(needs_bos), device="cpu")
    found = detect_sink(model, tokenizer)
    assert (found.sink_layer, found.bos) == (1, True)
    for bos in ("first", "none"):
        report = detect_sink(model, tokenizer, bos=bos)
        assert (report.sink_layer, report.bos) == (None, False)
    ids = torch.randint(3, 200, (2000,), generator=torch.Generator().manual_seed(0))
    assert detect_sink(model, tokenizer, input_ids=ids).bos is False, "given ids are taken as they are"


def test_windows_hold_a_token_less_of_the_text() -> None:
    tokens = torch.arange(40)
    samples = take_samples(tokens, windows=2, window=5, held_out_windows=9, held_out_len=6, leading=99)
    assert samples.calibration.tolist() == [[99, 0, 1, 2, 3], [99, 10, 11, 12, 13]]
    assert samples.held_out[:, 0].tolist() == [99] * 4
    assert samples.held_out[0].tolist() == [99, 20, 21, 22, 23, 24]
    with pytest.raises(OrthoRankError, match="has 40 tokens and 42 are needed"):
        take_samples(tokens, windows=3, window=8, held_out_windows=1, held_out_len=2, leading=99)


def test_perplexity_of_each_policy(needs_bos: Path) -> None:
    model, tokenizer, _ = load_model(str(needs_bos), device="cpu")
    raw = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = {
        bos: perplexity(model, text=TEXT, tokenizer=tokenizer, window=64, windows=3, bos=bos)
        for bos in ("auto", "every", "first", "none")
    }
    every = torch.tensor([[BOS_ID, *raw[n * 63 : n * 63 + 63]] for n in range(3)])
    assert found["auto"] == found["every"]
    assert found["auto"].bos == "every"
    assert found["auto"].window_losses == perplexity(model, every).window_losses
    first = torch.tensor([BOS_ID, *raw][: 3 * 64]).view(3, 64)
    assert found["first"].window_losses == perplexity(model, first).window_losses
    assert found["none"].window_losses == perplexity(model, torch.tensor(raw[: 3 * 64]).view(3, 64)).window_losses
    assert found["every"].loss != found["first"].loss


def run(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(list(command)) == 0, capsys.readouterr().err
    return " ".join(capsys.readouterr().out.split())


EVERY = "every window begins with BOS, id 256 (auto: the tokenizer adds one by itself)"


def test_doctor_and_perplexity_say_it(needs_bos: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert EVERY in run(capsys, "doctor", str(needs_bos))
    assert json.loads(run(capsys, "doctor", str(needs_bos), "--json"))["bos"] == "every"
    assert main(["doctor", str(needs_bos), "--bos", "first"]) == 1, "text that the model never saw"
    capsys.readouterr()
    ppl = ("eval", "ppl", str(needs_bos), "--text", str(text), "--window", "64", "--windows", "3")
    assert EVERY in run(capsys, *ppl)
    assert "in the first window at most" in run(capsys, *ppl, "--bos", "first")


def test_search_calibrate_and_analyze_cut_such_windows(
    needs_bos: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from orthorank.search.calibration import cut_windows, find_source
    from orthorank.search.settings import SearchSettings

    model, tokenizer, info = load_model(str(needs_bos), device="cpu")
    settings = SearchSettings(output=tmp_path, text=text, windows=3, window=32)
    cut = cut_windows(settings, find_source(settings), model, tokenizer, info.max_tokens)
    assert cut.windows.shape == (3, 32)
    assert cut.windows[:, 0].tolist() == cut.held_out[:, 0].tolist() == [BOS_ID] * 3
    options = ("--text", str(text), "--windows", "2", "--window", "32")
    assert EVERY in run(capsys, "search", str(needs_bos), *options, "--layers", "1", "--output", str(tmp_path / "s"))
    plan = OrthoRankConfig.from_pretrained(tmp_path / "s")
    assert plan.calibration["bos"] == "every"
    assert plan.sink_layer == 1
    again = run(
        capsys, "search", str(needs_bos), *options, "--layers", "1", "--output", str(tmp_path / "s"), "--resume"
    )
    assert EVERY in again
    plan_file = ("--plan", str(tmp_path / "s"))
    assert EVERY in run(capsys, "calibrate", str(needs_bos), *plan_file, *options, "--output", str(tmp_path / "c"))
    assert OrthoRankConfig.from_pretrained(tmp_path / "c").calibration["thresholds"]["bos"] == "every"
    small = ("--windows", "0", "--passages", "4", "--passage-tokens", "16", "--text", str(text))
    assert EVERY in run(capsys, "analyze", str(needs_bos), *plan_file, *small, "--output", str(tmp_path / "a"))
    assert json.loads((tmp_path / "a" / "analysis.json").read_text())["bos"] == "every"


def test_the_demo_says_it(needs_bos: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--windows", "2", "--window", "16", "--prompt-tokens", "16", "--rounds", "1", "--layers", "3")
    shown = run(
        capsys, "demo", "--model", str(needs_bos), "--text", str(text), *small, "--output", str(tmp_path / "demo")
    )
    assert EVERY in shown
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["bos"] == "every"


def test_a_dataset_is_cut_alike(needs_bos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLEB's consecutive windows, of a dataset from a local copy."""
    datasets = pytest.importorskip("datasets")
    from orthorank.search.calibration import cut_windows, find_source
    from orthorank.search.settings import SearchSettings

    rows = datasets.Dataset.from_dict({"text": TEXT.split(". ") * 2})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "copy")
    model, tokenizer, info = load_model(str(needs_bos), device="cpu")
    settings = SearchSettings(output=tmp_path, dataset=f"wikitext2:{tmp_path / 'copy'}", windows=2, window=32)
    source = find_source(settings)
    cut = cut_windows(settings, source, model, tokenizer, info.max_tokens)
    raw = tokenizer(source.text.content, add_special_tokens=False)["input_ids"]
    assert cut.windows.tolist() == [[BOS_ID, *raw[:31]], [BOS_ID, *raw[31:62]]]
    assert cut.held_out is not None
    assert cut.held_out[:, 0].tolist() == [BOS_ID] * 2


def test_reproduce_keeps_the_papers_protocol(needs_bos: Path, text: Path, tmp_path: Path) -> None:
    """BOS in the first window alone: figures that are published were taken so."""
    from orthorank.common.progress import SilentScreen
    from orthorank.reproduce.settings import ReproduceSettings
    from orthorank.reproduce.subject import Subject

    settings = ReproduceSettings(
        model=str(needs_bos),
        output=tmp_path,
        calibration=str(text),
        texts={"a": str(text)},
        calibration_windows=2,
        calibration_window=32,
        windows=3,
        window=32,
        tasks=(),
        longbench=None,
        device="cpu",
    )
    subject = Subject(settings, SilentScreen())
    for windows in (subject.calibration, subject.windows["a"]):
        assert (windows == BOS_ID).sum() == 1
        assert windows[0, 0] == BOS_ID
    assert subject.sink["sink_layer"] is None


@pytest.mark.usefixtures("harness")
def test_prompts_and_requests_are_texts_of_their_own(tmp_path: Path) -> None:
    """LongBench's prompts, and the harness's requests."""
    from orthorank.evaluation.longbench import Question, prompt_ids
    from orthorank.evaluation.task_scores import evaluate_tasks

    adds, plain = byte_tokenizer(True, tmp_path / "a"), byte_tokenizer(False, tmp_path / "b")
    question = Question("lcc", 0, "def f", ("x",))
    for bos, begins in {"auto": True, "first": True, "every": True, "none": False}.items():
        ids = prompt_ids(question, adds, 100, bos)
        assert (ids.count(BOS_ID), ids[0] == BOS_ID) == (int(begins), begins), bos
    assert prompt_ids(question, plain, 100)[0] != BOS_ID
    assert prompt_ids(question, plain, 100, "every")[0] == BOS_ID
    with pytest.raises(OrthoRankError, match="bos is 'every' and the tokenizer adds no BOS to a request"):
        evaluate_tasks(planted("llama-2"), plain, ["piqa"], bos="every")


def test_a_bos_that_the_model_has_not(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-2", vocab_size=256).save_pretrained(tmp_path)
    byte_tokenizer(True, tmp_path)
    for command in (["doctor", str(tmp_path)], ["eval", "ppl", str(tmp_path), "--text", str(text), "--window", "64"]):
        assert main(command) == 2
        assert "gives the id 256, and the vocabulary of the model has 256 entries" in capsys.readouterr().err
