"""The command ``orthorank``: what it is called with, and how it ends.

It ends with 0, with 1 where a command answers "no" (`orthorank doctor`, `--max-loss`), or with 2 and one sentence on
stderr. Commands import torch and transformers when they run, so that ``--help`` does not wait for them and Ctrl-C is
always understood.
"""

import functools
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, get_args

from orthorank.common.errors import OrthoRankError, shown
from orthorank_kernels._version import __version__
from orthorank_kernels.remedies import install

if TYPE_CHECKING:
    import typer

FAILED = 2
INTERRUPTED = 130  # what typer makes of Ctrl-C, in some versions
MOST = 2**31 - 1  # of any number of tokens, layers or rounds: what lies beyond it overflows somewhere
NOTHING_KEPT = "interrupted before there was anything to keep"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (None: the process's own) and return its exit code.

    Errors that a user can mend are one sentence on stderr, never a traceback.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    orthorank-kernels ...
    0
    """
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"the command line needs {' and '.join(missing)}; run: {install('demo')}")
    given = sys.argv[1:] if arguments is None else arguments
    if (empty := _empty(given)) is not None:
        return _fail(f"{empty} is empty; give it a value, or leave it out")
    return answer(lambda: _app(next(iter(given), ""), helping="--help" in given), given, "orthorank")


def _empty(given: Sequence[str]) -> str | None:
    """The option or argument that is an empty string, as of a shell's variable that is not set; None: none is.

    >>> _empty(["eval", "ppl", "--plan", ""]), _empty(["doctor", ""]), _empty(["demo", "--text="])
    ('--plan', 'an argument of doctor', '--text')
    """
    for before, word in zip(("", *given), given if given[:1] != ["lm-eval"] else (), strict=False):
        if word.startswith("--") and word.find("=") == len(word) - 1:
            return word[:-1]
        if not word:
            return before if before.startswith("--") else f"an argument of {given[0] or 'orthorank'}"
    return None


def answer(app: Callable[[], "typer.Typer"], arguments: Sequence[str] | None, name: str) -> int:
    """Run the command line ``arguments`` by what ``app`` makes, which users call ``name``; its exit code."""
    import typer

    usage_error: Any = typer.BadParameter.__base__  # click's class, or that of the copy of click inside typer
    try:
        with _plain_warnings(name):
            code = int(app()(args=arguments, standalone_mode=False, prog_name=name) or 0)
        return code if code != INTERRUPTED else _fail(NOTHING_KEPT)
    except usage_error as error:
        return _fail(f"{error.format_message()} ({name} {_command_of(error, name)}--help lists what there is)")
    except (KeyboardInterrupt, typer.Abort):
        return _fail(NOTHING_KEPT)
    except OrthoRankError as error:
        return _fail(str(error))
    except (BrokenPipeError, SystemExit):  # rich and click leave by SystemExit when the reader has closed the pipe
        return _fail("the output was closed")
    except Exception as error:
        if _interrupted(error):
            return _fail(NOTHING_KEPT)
        if not isinstance(error, OSError):
            raise
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"the file system says of{where or ' a file'}: {error.strerror or error}")


# In the order of the help; each has a module of its name.
COMMANDS = (
    *("demo", "doctor", "estimate", "bench", "env", "reproduce", "analyze", "search", "calibrate", "correct"),
    *("compare", "export", "vllm-args", "lm-eval"),
)
EVALUATIONS = ("ppl", "tasks", "longbench")


def _app(wanted: str = "", helping: bool = True) -> "typer.Typer":
    """The command line with the command ``wanted`` alone, whose module is imported; with all where there is no such.

    Args:
        helping: whether a command's help may be asked for, which ends in examples.
    """
    import typer

    app = typer.Typer(
        name="orthorank",
        help="OrthoRank: in chosen layers, update only the tokens most orthogonal to the sink token.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    known = wanted in COMMANDS or wanted == "eval"

    def said_of(name: str) -> dict[str, Any]:
        if known and not helping:
            return {}
        from orthorank.commands.summaries import SHORT, epilog

        return {"short_help": SHORT[name], "epilog": epilog(name)}

    def module_of(name: str) -> Any:
        return import_module(f"orthorank.commands.{name.replace('-', '_').replace(' ', '_')}")

    for name in COMMANDS if not known else {wanted} & set(COMMANDS):
        module = module_of(name)
        if (settings := getattr(module, "SETTINGS", None)) is None:
            app.command(name, **said_of(name))(bounded(module.command))
        else:  # its arguments are passed on
            app.command(name, add_help_option=False, context_settings=settings, **said_of(name))(module.command)
    if not known or wanted == "eval":
        measure = typer.Typer(help="Measure a model, dense and with plans: perplexity, tasks, LongBench.")
        for name in EVALUATIONS:
            measure.command(name, **said_of(f"eval {name}"))(bounded(module_of(f"eval {name}").command))
        app.add_typer(measure, name="eval", **said_of("eval"))

    @app.callback(invoke_without_command=True)
    def orthorank(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    ) -> int:
        if version:
            print(f"orthorank-kernels {__version__}")
        elif context.invoked_subcommand is None:
            print(context.get_help())
        return 0

    return app


def bounded(command: Callable[..., int]) -> Callable[..., int]:
    """``command`` with its whole numbers checked, and with ``--revision`` where it has a model.

    Numbers are checked here so that no tensor and no loop has to be the first to overflow.
    """
    import typer

    signature = inspect.signature(command)
    model = signature.parameters.get("model")
    of_hub = model is not None and get_args(model.annotation)[:1] == (str | None,)  # else it is a local folder

    @functools.wraps(command)
    def run(**options: Any) -> int:
        if of_hub and (revision := options.pop("revision")) is not None:
            from orthorank.models import at_revision

            name = "named" if options.get("named") else "model"
            options[name] = at_revision(options[name], revision)
        for name, given in options.items():
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(value, int) and abs(value) > MOST:
                    bound = f"at most {MOST:,}" if value > 0 else f"at least -{MOST:,}"
                    raise OrthoRankError(f"{_as_typed(command, name)} is {shown(value)}; it must be {bound}")
        return command(**options)

    if of_hub:
        asked = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
        option = inspect.Parameter("revision", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=asked)
        run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run


def _as_typed(command: Callable[..., int], name: str) -> str:
    """How a user types the parameter ``name`` of ``command``: ``--option``, or the argument's name in capitals."""
    said = getattr(inspect.signature(command).parameters[name].annotation, "__metadata__", ())
    declared = [text for info in said for text in getattr(info, "param_decls", None) or ()]
    longest = max((text.split("/")[0] for text in declared if text.startswith("-")), key=len, default="")
    if any(type(info).__name__ == "ArgumentInfo" for info in said):
        return name.upper()
    return longest or f"--{name.replace('_', '-')}"


@contextmanager
def _plain_warnings(name: str) -> Iterator[None]:
    """This package's own warnings as a line without the place in the code, which would be one of typer's."""
    before = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == "warnings" and frame.f_back is not None:
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("orthorank", "orthorank_kernels"):
            print(f"{name}: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: libraries wrap what stops them in the middle of an import or a download."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _command_of(error: Any, whole: str) -> str:
    context = getattr(error, "ctx", None)
    name = "" if context is None else context.info_name or ""
    return "" if name in ("", whole) else f"{name} "


def _fail(sentence: str) -> int:
    print(f"orthorank: {' '.join(sentence.split())}", file=sys.stderr)
    return FAILED
