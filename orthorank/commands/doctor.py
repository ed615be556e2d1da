"""``orthorank doctor``: does OrthoRank apply to a model, and why or why not."""

from typing import Annotated

import typer

from orthorank.commands import BosChoice, Device, Model
from orthorank.commands.loading import load
from orthorank.commands.screen import RichScreen, console, print_json
from orthorank.common import format as words
from orthorank.common.texts import Bos, check_bos


def command(
    model: Model = None,
    device: Device = "auto",
    bos: BosChoice = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> int:
    """Say whether OrthoRank applies to a model, and why.

    Looks for the layer after which the first token is an attention sink. The exit code is 0 if OrthoRank applies, 1 if
    it does not, and 2 if the model could not be examined.
    """
    from orthorank.serving.vllm.installed import installed
    from orthorank.stack.sink import candidate_layers, detect_sink

    check_bos(bos)
    screen = RichScreen(console(stderr=json))
    loaded, tokenizer, info = load(screen, model, device)
    where = Bos.of(bos, tokenizer)
    sink = detect_sink(loaded, tokenizer, bos=bos)
    candidates, vllm = candidate_layers(sink) if sink.applies else [], installed()
    if json:
        print_json(
            {
                "model": info.to_dict(),
                "bos": where.policy,
                "sink": sink.to_dict(),
                "candidate_layers": candidates,
                "vllm": vllm.to_dict() | {"serves": vllm.serves(info.model_type)},
            }
        )
        return 0 if sink.applies else 1
    screen.heading(f"{info.name}: OrthoRank {'applies' if sink.applies else 'does not apply'}")
    screen.say(words.sink_sentence(sink.to_dict()))
    for line in words.sink_figures(sink.to_dict()):
        screen.say(line)
    screen.say(f"Passages: {where}.")
    if sink.applies:
        screen.say(
            f"Layers {words.layers(candidates)} may select tokens ({len(candidates)} of {info.num_hidden_layers})."
        )
    elif sink.sink_layer is not None:
        screen.say("It forms so late that no layer is left between it and the protected last two.")
    screen.say(vllm.sentence(info.model_type))
    return 0 if sink.applies else 1
