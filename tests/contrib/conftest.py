"""The fixtures of the method's tests."""

from tests.orthorank.conftest import tiny_folder

__all__ = ["tiny_folder"]
