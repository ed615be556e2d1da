"""The token map as HTML: a text whose tokens are shaded by in how many layers they were updated. No script."""

from html import escape
from typing import Any

SHADES = 6  # from never updated to updated in every selecting layer


def token_map_html(found: dict[str, Any]) -> str:
    """The map of ``found`` (see `orthorank.analysis.token_map.TokenMap`).

    Hovering over a token or moving to it with the Tab key shows its layers. The text of all tokens, read one after the
    other, is the text itself.
    """
    total = len(found["selecting"])
    tokens = "".join(
        _token(number, piece, layers, total)
        for number, (piece, layers) in enumerate(zip(found["pieces"], found["layers"], strict=True))
    )
    steps = "".join(f'<span class="token shade{shade}">&nbsp;</span>' for shade in range(SHADES + 1))
    return (
        f'<p class="legend soft">updated in no layer <span class="steps">{steps}</span> in all {total}</p>\n'
        f'<a class="skip" href="#after-map">skip the {len(found["pieces"])} tokens</a>\n'
        f'<div class="tokens" role="group" aria-label="token map">{tokens}</div><div id="after-map"></div>'
    )


def _token(number: int, piece: str, layers: list[int], total: int) -> str:
    shade = 0 if not layers else max(1, round(SHADES * len(layers) / total))
    which = f"in {len(layers)} of {total} layers: {', '.join(map(str, layers))}" if layers else "in no selecting layer"
    note = "the sink; it bypasses them all" if number == 0 and not layers else f"updated {which}"
    detail = escape(f"token {number}, {note}", quote=True)
    spoken = f"{escape(piece, quote=True)}: {detail}"
    return (
        f'<span class="token shade{shade}" role="img" tabindex="0" data-detail="{detail}" aria-label="{spoken}">'
        f"{escape(piece)}</span>"
    )
