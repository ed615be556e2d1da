"""Models for the tests of the packed layer."""

from typing import Any

import pytest

from tests.orthorank.models import tiny


@pytest.fixture(scope="session")
def models() -> dict[str, Any]:
    """With full attention in all layers."""
    return {name: tiny(name, use_sliding_window=False) for name in ("llama-2", "llama-3", "qwen3")}
