"""The HTML page of a run: one file that loads nothing, for light and dark, narrow and wide screens.

What it says stands in ``page.html.j2``, how it looks in ``page.css``.
"""

import shlex
from typing import Any

from orthorank.common import format as form
from orthorank.common.errors import OrthoRankError
from orthorank.common.plot import DARK, LIGHT, dark_rules
from orthorank.report import pictures, words
from orthorank.report.words import Results
from orthorank_kernels.remedies import install


def html_page(results: Results) -> str:
    """The page for ``results`` as the demo writes them, complete or not.

    Args:
        results: the content of ``results.json``.

    Returns:
        An HTML document as text.

    Raises:
        OrthoRankError: jinja2 or matplotlib is not installed.
    """
    return render("page.html.j2", results=results)


def render(template: str, **given: Any) -> str:
    """The page that the template of this name makes of ``given``; raises as `html_page` does."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise OrthoRankError(f"the report needs jinja2; run: {install('demo')}") from error
    environment = Environment(
        loader=PackageLoader("orthorank.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"repr": repr, "quoted": shlex.quote}
    colours = {"light": LIGHT, "dark": DARK, "dark_rules": dark_rules()}
    return environment.get_template(template).render(words=words, form=form, pictures=pictures, **colours, **given)
