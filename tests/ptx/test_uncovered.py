"""The table of what is not covered is true."""

import pytest

from tests.ptx import snippet
from tests.ptx.errors import UnknownInstruction
from tests.ptx.uncovered import UNCOVERED


@pytest.mark.parametrize("text", UNCOVERED)
def test_it_is_refused_by_name(text):
    with pytest.raises(UnknownInstruction) as raised:
        snippet.run(text)
    assert text.split()[0].rstrip(";") in str(raised.value)
