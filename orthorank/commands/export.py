"""``orthorank export``: a plan that only removes layers, as a smaller checkpoint that needs none of this package."""

import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthorank.commands import Model
from orthorank.commands.screen import RichScreen, console
from orthorank.common.errors import OrthoRankError
from orthorank.common.files import writable_folder

if TYPE_CHECKING:
    from torch import Tensor

PLAN = "A plan file, its folder, or org/name@revision on the Hub. It may only remove layers (keep ratio 0)."
DTYPE = "float32, bfloat16 or float16. Default: as the checkpoint says; float32 of a .gguf file."
NO_LLAMA_CPP = (
    "Not for llama.cpp: it tells this model's kinds of layers apart by their number, so those behind a removed one "
    "would be taken for another kind."
)
TOKENS = 64  # on which the checkpoint is compared with the plan


def command(
    plan: Annotated[str, typer.Option(help=PLAN, show_default=False)],
    output: Annotated[
        Path, typer.Option(help="Folder for the checkpoint, without files of one in it.", show_default=False)
    ],
    model: Model = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE, show_default=False)] = None,
) -> int:
    """Write a model without the layers that a plan removes, as an ordinary smaller checkpoint.

    The checkpoint loads like any other of its architecture: in AutoModel, in vLLM without the plugin. Plans that select
    tokens or are corrected are refused, since an ordinary checkpoint has no place for that. Runs on the CPU, and loads
    the checkpoint again to compare its logits with those of the model with the plan. Prints the command with which
    llama.cpp prunes a .gguf file the same way.
    """
    from orthorank.config import OrthoRankConfig
    from orthorank.export import OF_MODEL, OF_TOKENIZER, check_empty, export_pruned, layers_alike, removed_layers

    followed = OrthoRankConfig.from_pretrained(plan)
    removed = removed_layers(followed)
    folder = writable_folder(output)
    check_empty(folder, "output", (*OF_MODEL, *OF_TOKENIZER))

    from orthorank.common.loading import quiet
    from orthorank.hf.apply import apply
    from orthorank.models import load_model, locate, stored_dtype

    where, screen = locate(model), RichScreen(console())
    with screen.progress(f"loading {where.name}", 1):
        loaded, tokenizer, info = load_model(model, "cpu", dtype or stored_dtype(where))
    with apply(loaded, followed):
        expected = _logits(loaded)
    alike, before = layers_alike(loaded.config), info.parameters
    part = Path(tempfile.mkdtemp(prefix=".orthorank-", dir=folder))  # until the checkpoint is whole and right
    try:
        with screen.progress(f"writing {folder}", 1), quiet():
            try:
                export_pruned(loaded, followed, part)
            except OrthoRankError as error:  # of the folder that was named
                raise OrthoRankError(str(error).replace(str(part), str(folder))) from error
            try:
                tokenizer.save_pretrained(part)
            except Exception as error:  # tokenizers raises nothing more special on a full disk
                raise OrthoRankError(f"output folder {str(folder)!r} cannot be written to: {error}") from error
        del loaded
        with screen.progress(f"loading {folder}", 1):
            written, _, read = load_model(str(part), "cpu", info.dtype)
        difference = float((_logits(written) - expected).abs().max())
        if difference != 0:
            raise OrthoRankError(
                f"the checkpoint's logits are not those of the model with the plan: they differ by {difference:.3g}. "
                f"Something in {where.name}'s configuration goes by a layer's number; nothing was written to {folder}"
            )
        check_empty(folder, "output", [file.name for file in part.iterdir()])  # again: others write, too
        for file in part.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    info = replace(read, name=str(folder))
    screen.heading(f"{info.name}: {where.name} without layer{'s' * (len(removed) > 1)} {', '.join(map(str, removed))}")
    screen.say(
        f"{info.num_hidden_layers} layers, {info.parameters / 1e6:,.1f} of {before / 1e6:,.1f} million weights, "
        f"{info.dtype}; loaded again, logits of {TOKENS} tokens equal to those of the plan"
    )
    screen.say("The same in llama.cpp:" if alike else NO_LLAMA_CPP)
    if alike:  # a line to be copied, so it is not broken
        screen.console.print(llama_cpp(removed, where.gguf_file), soft_wrap=True)
    return 0


def llama_cpp(removed: list[int], gguf_file: str | None) -> str:
    """The command with which llama.cpp removes these layers from a file.

    >>> llama_cpp([3, 12], None)
    'llama-quantize --prune-layers 3,12 MODEL.gguf PRUNED.gguf COPY'
    """
    pruned = ",".join(map(str, removed))
    return f"llama-quantize --prune-layers {pruned} {shlex.quote(gguf_file or 'MODEL.gguf')} PRUNED.gguf COPY"


def _logits(model: Any) -> "Tensor":
    """Of the same random tokens each time."""
    import torch

    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits: Tensor = model(ids, use_cache=False).logits.float()
    return logits
