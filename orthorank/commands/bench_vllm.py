"""``orthorank bench --engine vllm``: how fast the dense model and plans are inside vLLM."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from orthorank.commands.bench_shared import counted, shipped, show_rows
from orthorank.commands.screen import RichScreen
from orthorank.common.errors import OrthoRankError
from orthorank.common.files import from_json
from orthorank.common.format import count
from orthorank.common.loading import quiet

if TYPE_CHECKING:
    from orthorank.speed.bench import BenchSettings

NEEDS_FOLDER = "vLLM loads folders with config.json and safetensors, and hub ids"
COLUMNS = [
    ("", "name"),
    ("nominal", "nominal_sparsity"),
    ("FLOPs", "flop_speedup"),
    ("prefill", "prefill_speedup"),
    ("±", "prefill_speedup_spread"),
    ("tok/s", "prefill_tokens_per_second"),
    ("token 1", "first_token_speedup"),
    ("±", "first_token_speedup_spread"),
    ("ms", "first_token_seconds"),
]
LEGEND = (
    "nominal: share of token updates left out; FLOPs: the speed-up that they alone would give; then the measured "
    "prefill of all prompts at once and time to the first token of one prompt; ±: half of the range between the "
    "quartiles of the speed-up."
)


def measured(
    screen: RichScreen,
    model: str | None,
    plans: dict[str, Any],
    settings: "BenchSettings",
    dtype: str | None,
    vllm_args: str | None,
) -> dict[str, Any]:
    """What `run_vllm_bench` measures; arguments are those of `orthorank.commands.bench.command`, read."""
    from orthorank.speed.bench_vllm import check_installed, results_of, run_vllm_bench

    check_installed()
    path, revision, config = _model(model)
    arguments = ({} if revision is None else {"revision": revision}) | _arguments(vllm_args, dtype)
    variants: dict[str, Any] = {"dense": None} | (plans or shipped(SimpleNamespace(config=config)))
    total = len(variants) + 2 * settings.rounds
    with screen.progress("timing", total) as advance:
        report = run_vllm_bench(path, config, variants, settings, arguments=arguments, on_step=counted(advance))
    return results_of(path, config, variants, report)


def _arguments(words: str | None, dtype: str | None) -> dict[str, Any]:
    from orthorank.models import DTYPES, SHORT

    dtype = SHORT.get(dtype or "", dtype)
    if dtype is not None and dtype not in DTYPES:
        raise OrthoRankError(f"dtype is {dtype!r}; it may be {', '.join(DTYPES)}")
    try:
        arguments = from_json(words or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise OrthoRankError(
            f"""vllm_args is {words!r}; it must be a JSON object such as '{{"enforce_eager": true}}'"""
        )
    return ({} if dtype is None else {"dtype": dtype}) | arguments


def _model(name: str | None) -> tuple[str, str | None, Any]:
    """What vLLM is given, a path and a revision, and the model's configuration."""
    from transformers import AutoConfig

    from orthorank.models import locate

    if name is None:
        raise OrthoRankError(f"--engine vllm needs a model: {NEEDS_FOLDER}")
    where = locate(name)
    if where.gguf_file is not None:
        raise OrthoRankError(
            f"model {name!r} is a GGUF file, and {NEEDS_FOLDER}; save the model to a folder with transformers' "
            "save_pretrained"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(where.path, **where.arguments)
    except (OSError, ValueError) as error:
        raise OrthoRankError(f"the configuration of model {name!r} cannot be read: {error}") from error
    if where.source == "folder" and not any(Path(where.path).glob("*.safetensors")):
        raise OrthoRankError(f"model {name!r} has no .safetensors file, and {NEEDS_FOLDER}")
    return where.path, where.revision, config.get_text_config()


def show(screen: RichScreen, results: dict[str, Any]) -> None:
    """Print the results for people."""
    bench, model = results["bench"], results["model"]
    settings = bench["settings"]
    threads = f", {bench['prefill']['threads']} threads" if model["device"] == "cpu" else ""
    screen.heading(
        f"{model['name']}: {model['dtype']} on {model['device']}{threads}, vLLM {bench['version']}, "
        f"{bench['attention_backend']}, by {bench['prefill']['clock']}"
    )
    screen.say(
        f"Prompts of {settings['batch_size']} x {settings['prompt_tokens']} random tokens, "
        f"{count(settings['rounds'], 'round')}."
    )
    show_rows(screen, results["rows"], settings["rounds"], COLUMNS, LEGEND)
    if bench["remark"] is not None:
        screen.say(bench["remark"])
    else:
        ways = [f"{name} {way}" for name, way in bench["attention"].items() if way is not None]
        screen.say(f"The way in which selected queries attended: {', '.join(ways) or 'none was selected'}.")
