"""``orthorank env``: versions, devices, and which implementation each op would take."""

from typing import Annotated

import typer

from orthorank.commands.screen import console, print_json


def command(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> int:
    """Versions, devices, and for each op which implementation it takes and why."""
    from orthorank.common.environment import environment, op_backends
    from orthorank.serving.vllm.installed import installed

    here, vllm = environment(), installed()
    choices = [choice for device in here.devices for choice in op_backends(device.split()[0])]
    if json:
        print_json({**here.to_dict(), "vllm": vllm.to_dict(), "ops": [vars(choice) for choice in choices]})
        return 0

    from rich.markup import escape
    from rich.table import Table

    terminal = console()
    versions = Table(box=None, show_header=False, pad_edge=False)
    versions.add_row("python", here.python)
    for name, version in here.versions.items():
        versions.add_row(name, version or "not installed")
    versions.add_row("vllm", escape(vllm.plugin))
    versions.add_row("platform", here.platform)
    versions.add_row("processor", f"{here.processor}; PyTorch uses {here.threads} threads")
    versions.add_row("devices", "\n".join(here.devices))
    terminal.print(versions)
    ops = Table("op", "device", 'backend="auto" takes', "because", box=None, pad_edge=False)
    for choice in choices:
        ops.add_row(choice.op, choice.device, choice.backend, choice.reason)
    terminal.print()
    terminal.print(ops)
    return 0
