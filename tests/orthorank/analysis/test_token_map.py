"""The token map: what it says is what the layers select, and its tokens add up to the text."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import orthorank
from orthorank.analysis.token_map import token_map
from orthorank.common.errors import OrthoRankError
from orthorank.report import html_page
from tests.orthorank.report.test_report import Page, contrast

TEXT = "A word, <b>another</b> word & naïve 日本語 words.\nA second line of it."
PLAN = orthorank.OrthoRankConfig(layers=[1, 2, 4], keep_ratio=0.4)
SHADES = 6  # from never updated to updated in every selecting layer


def page_of(found: dict[str, Any]) -> str:
    return html_page({"model": "a model", "token_map": found})


@pytest.fixture
def loaded(tiny_folder: Path) -> tuple[Any, Any]:
    from orthorank.models import load_model

    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    return model, tokenizer


def test_it_is_what_the_layers_select(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    found = token_map(model, tokenizer, PLAN, TEXT)
    ids = tokenizer(TEXT)["input_ids"]
    updated = {layer: set() for layer in PLAN.layers}
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: states.append((output[0] - args[0][0]).abs().sum(-1)))
        for layer in model.model.layers
    ]
    with orthorank.apply(model, PLAN), torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    for layer in PLAN.layers:  # a token that a layer does not update comes out as it went in
        updated[layer] = set(states[layer].nonzero().flatten().tolist())
    assert found.selecting == (1, 2, 4)
    assert len(found.layers) == len(ids)
    for position, layers in enumerate(found.layers):
        assert layers == tuple(layer for layer in PLAN.layers if position in updated[layer])
    assert found.layers[0] == (), "the sink"
    assert orthorank.handle_of(model) is None


@pytest.mark.parametrize("tokens", [1, 7, 40, 400])
def test_pieces_add_up_to_the_text(loaded: tuple[Any, Any], tokens: int) -> None:
    model, tokenizer = loaded
    found = token_map(model, tokenizer, PLAN, TEXT, tokens)
    whole = "".join(found.pieces)
    assert TEXT.startswith(whole)
    if tokens == 400:
        assert whole == TEXT
    html = page_of(found.to_dict())
    page = Page(html)
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "tabindex" in attributes]
    assert len(spans) == len(found.pieces)
    (tokens,) = re.findall(r'<div class="tokens".*?</div>', html, re.DOTALL)
    assert "".join(Page(tokens).words) == whole
    ids = {attributes.get("id") for _, attributes in page.tags}
    (way_past,) = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert way_past.removeprefix("#") in ids, "the keyboard need not go through all tokens"


def test_shades_say_in_how_many_layers() -> None:
    found = {"pieces": ["a", "b", "c", "d"], "layers": [[], [1], [1, 2], [1, 2, 3]], "selecting": [1, 2, 3]}
    page = Page(page_of(found))
    spans = [a for tag, a in page.tags if tag == "span" and "tabindex" in a]
    shades = [a["class"] for a in spans]
    assert shades == ["token shade0", "token shade2", "token shade4", f"token shade{SHADES}"]
    assert spans[2]["data-detail"] == "token 2, updated in 2 of 3 layers: 1, 2"
    assert spans[0]["data-detail"] == "token 0, the sink; it bypasses them all"


def test_errors(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    with pytest.raises(OrthoRankError, match="text has no tokens"):
        token_map(model, tokenizer, PLAN, "")
    with pytest.raises(OrthoRankError, match="use the fast one"):
        token_map(model, object(), PLAN, "a")  # type: ignore[arg-type]


@pytest.mark.parametrize("dark", [False, True])
def test_the_text_is_read_on_every_shade(dark: bool) -> None:
    """WCAG's contrast of 4.5 between the text and each shade behind it, in the light and in the dark."""
    css = html_page({"model": "a model"})
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", css.split("@media (prefers-color-scheme: dark)")[dark]))
    shares = [int(share) / 100 for share in re.findall(r"var\(--map\) (\d+)%", css)]
    assert len(shares) == SHADES
    card, shade = (bytes.fromhex(colours[name][1:]) for name in ("card", "map"))
    for share in shares:
        mixed = bytes(round(share * over + (1 - share) * under) for over, under in zip(shade, card, strict=True))
        assert contrast(colours["ink"], mixed.hex()) >= 4.5, (share, mixed)
