"""The page is read back: structure, figures, and what it says when OrthoRank is the worse choice."""

import re
import shlex
import sys
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orthorank.common.errors import OrthoRankError
from orthorank.common.plot import DARK, LIGHT
from orthorank.report import html_page, pictures, words

VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps tags, links and texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == [], f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.tags)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())  # a space that does not break counts as a space


def a_row(name: str, layers: list[int], keep_ratio: float, **figures: Any) -> dict[str, Any]:
    sparsity = len(layers) * (1 - keep_ratio) / 30
    return {"name": name, "layers": layers, "keep_ratio": keep_ratio, "nominal_sparsity": sparsity, **figures}


@pytest.fixture
def results() -> dict[str, Any]:
    layers = list(range(14, 23))
    return {
        "complete": True,
        "created": "2026-01-02T03:04:05+00:00",
        "model": "owner/<model>",
        "text": "a text",
        "rows": [
            a_row("dense", [], 1.0, perplexity=21.153, tokens_per_second=1000.0, speedup=1.0, flop_speedup=1.0),
            a_row(
                "layer-pruning",
                [3, 5, 7, 9, 11, 20],
                0.0,
                perplexity=47.0,
                tokens_per_second=1250.0,
                speedup=1.25,
                flop_speedup=1.26,
            ),
            a_row(
                "orthorank", layers, 1 / 3, perplexity=50.0, tokens_per_second=1200.0, speedup=1.2, flop_speedup=1.24
            ),
        ],
        "plans": {
            "orthorank": {
                "layers": layers,
                "keep_ratio": 1 / 3,
                "candidates": list(range(12, 28)),
                "evaluations": 108,
                "tokens": 512,
                "origin": "greedy search",
            },
            "layer-pruning": {"layers": [3, 5, 7, 9, 11, 20], "keep_ratio": 0.0, "origin": "shipped with the package"},
        },
        "settings": {"model": None},
        "model_info": {
            "name": "owner/<model>",
            "source": "folder",
            "num_hidden_layers": 30,
            "parameters": 134_515_008,
            "dtype": "float32",
            "device": "cpu",
        },
        "text_info": {"name": "a text", "sha256": "0123456789abcdef", "tokens": 113_108},
        "quality": {
            "windows": 16,
            "seq_len": 512,
            "differences": [{"of": "orthorank", "against": "layer-pruning", "mean": 0.062, "standard_error": 0.01}],
        },
        "speed": {"prompt": 2048, "batch": 1, "rounds": 5, "clock": "wall clock"},
        "sink": {
            "reason": "the sink forms in layer 11 of 30",
            "sink_layer": 11,
            "ratios": [1.0] * 12 + [170.0] * 19,
            "cos_self": [0.5] * 12 + [0.99] * 17,
            "cos_others": [0.1] * 30,
        },
        "seconds": {"total": 200.0, "search orthorank": 45.0},
        "environment": {"processor": "a CPU", "threads": 2, "python": "3.11.7", "versions": {"torch": "2.13.0"}},
        "plan_file": "orthorank-demo/orthorank.json",
    }


def test_the_page_stands_alone(results):
    html = html_page(results)
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert [a for _, a in page.tags if {"src", "href", "srcset"} & set(a)] == []
    assert page.count("link") == page.count("iframe") == 0
    assert page.count("script") == 1, "that of the copy buttons, which is in the page"
    assert "@import" not in html
    assert "url(" not in html
    assert page.count("meta", name="viewport", content="width=device-width, initial-scale=1") == 1


def test_the_page_has_colours_for_light_and_dark_for_each_name_it_uses(results):
    html = html_page(results)
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    defined = [set(re.findall(r"(--[a-z-]+):", block)) for block in (light, dark)]
    assert defined[0] == defined[1] >= set(re.findall(r"var\((--[a-z-]+)\)", html))
    assert "prefers-color-scheme: dark" in html
    classes = {name for css in re.findall(r'class="([^"]+)"', html) for name in css.split()}
    assert {name for name in classes if f".{name}" not in html} == set(), "a class without a rule"


def test_the_verdict_comes_first_and_the_table_second(results):
    page = Page(html_page(results))
    text = page.text
    order = [text.index(word) for word in (words.verdict(results), "layers changed", "OrthoRank: 9 layers update 1/3")]
    assert order == sorted(order)
    assert page.count("tr") == 1 + 3
    for figure in ("21.15", "47.00", "50.00", "1.20x", "1.24x", "1,250"):
        assert figure in text


def test_names_are_escaped(results):
    html = html_page(results)
    assert "owner/&lt;model&gt;" in html
    assert "<h1>OrthoRank on owner/<wbr>&lt;model&gt;</h1>" in html
    assert "<model>" not in html


def test_pictures_fit_a_phone_and_have_words_for_those_who_cannot_see_them(results):
    html = html_page(results)
    drawn = [a for tag, a in Page(html).tags if tag == "svg"]
    assert len(drawn) == 2 + 1 + 2 * 2 + 3, "bars, speed against quality, two plans in two widths, the sink"
    assert all(a["role"] == "img" and a["aria-label"] for a in drawn)
    labels = [str(a["aria-label"]) for a in drawn]
    assert labels[0] == "Perplexity: lower is better: dense 21.15, layer pruning (SLEB) 47.00, OrthoRank 50.00"
    assert labels[2].endswith("dense 21.15 at 1.00x; layer pruning (SLEB) 47.00 at 1.25x; OrthoRank 50.00 at 1.20x")
    assert labels[-4] == "OrthoRank: 9 layers update 1/3 of the tokens, layers 14-22"
    wide = re.findall(r'<div class="wide">.*?</div>', html, re.DOTALL)
    shown = [float(points) * 96 / 72 for points in re.findall(r'<svg[^>]*width="([\d.]+)pt"', html)]
    assert len(wide) == 2
    assert sorted(set(map(round, shown))) == [326, 364, 760]


def test_a_page_of_two_plans_has_no_number_twice(results):
    found = {"pieces": ["a"], "layers": [[]], "selecting": [3]}
    ids = [a["id"] for _, a in Page(html_page(results | {"token_map": found})).tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert "after-map" in ids


def test_a_run_that_ended_early_still_gives_a_page(results):
    for key in ("rows", "plans", "quality", "speed", "plan_file", "sink"):
        results.pop(key)
    results["complete"] = False
    text = Page(html_page(results)).text
    assert "ended early" in text
    assert "ended before perplexity was measured" in text


def test_an_interrupted_search_shows_the_layers_so_far(results):
    results["rows"] = []
    del results["plans"]["layer-pruning"], results["seconds"]["search orthorank"]
    text = Page(html_page(results)).text
    assert "OrthoRank: 9 layers update 1/3 of the tokens" in text
    assert "before it was interrupted" in text


def test_partial_rows_show_a_dash(results):
    results["rows"][2] |= {"tokens_per_second": None, "speedup": None}
    assert "-" in words.cells(results["rows"][2])
    assert "Prefill runs" not in words.verdict(results)
    Page(html_page(results))


@pytest.mark.parametrize(
    ("pruned", "error", "said"),
    [
        (47.0, 0.01, "6.4 % higher than layer pruning's"),
        (60.0, 0.01, "16.7 % lower than layer pruning's"),
        (50.1, 0.0001, "cannot be told apart"),
        (47.0, 0.05, "cannot be told apart"),
        (47.0, None, "6.4 % higher than layer pruning's"),
    ],
)
def test_the_verdict_says_who_is_better_only_when_it_is_known(results, pruned, error, said):
    results["rows"][1]["perplexity"] = pruned
    results["quality"]["differences"][0]["standard_error"] = error
    assert said in words.verdict(results)


def test_the_verdict_without_layer_pruning(results):
    del results["rows"][1]
    assert "removed" not in words.verdict(results)
    assert words.verdict(results).startswith(
        "At 20 % sparsity OrthoRank has a perplexity of 50.00, 2.36 times the dense model's 21.15"
    )


def test_corrected_rows_are_on_the_page(results):
    for name, perplexity in (("layer-pruning", 40.0), ("orthorank", 30.0)):
        plain = next(row for row in results["rows"] if row["name"] == name)
        above = {"mean": 0.35, "standard_error": 0.02}
        corrected = plain | {"name": f"{name}-corrected", "perplexity": perplexity, "above_dense": above}
        results["rows"].append(corrected)
        results["plans"][name]["maps"] = {"rank": 64, "tokens": 4096, "given": False}
    of, against = "orthorank-corrected", "layer-pruning-corrected"
    pair = {"of": of, "against": against, "mean": -0.288, "standard_error": 0.01}
    results["quality"]["differences"].append(pair)
    text = Page(html_page(results)).text
    assert "OrthoRank, corrected 9 at 1/3 30.00 +0.350 ± 0.020" in text
    assert "OrthoRank, corrected against layer pruning, corrected: -0.288 ± 0.010 nats a token" in text
    said = words.verdict(results)
    assert "put back part of what is left out, OrthoRank has 30.00, layer pruning 40.00. On this text" in said
    assert "25 % lower than layer pruning's" in said
    assert text.count("9 layers update 1/3 of the tokens") == 2, "a plan's layers are shown once, in two widths"
    assert "shipped with the package; maps of rank 64, fitted on 4,096 tokens" in text


def test_the_verdict_says_where_the_sparsities_differ(results):
    results["rows"][1] |= {"layers": [3, 5, 7], "nominal_sparsity": 0.1}
    results["rows"][2] |= {"layers": [12, 13, 14, 18], "nominal_sparsity": 0.0889}
    said = words.verdict(results)
    assert said.startswith(
        "At 8.9 % sparsity OrthoRank has a perplexity of 50.00, 2.36 times the dense model's 21.15, and the model"
    )
    assert "with 3 layers removed (10 %) 47.00" in said


def shapes(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """The corners of every path of a colour of the palette, as ``(x, y)``."""
    paths = re.findall(rf'<path d="([^"]+)"[^>]*style="[^"]*{LIGHT[colour]}', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)] for path in paths]


def size(corners: list[tuple[float, float]], axis: int) -> float:
    return max(corner[axis] for corner in corners) - min(corner[axis] for corner in corners)


def test_a_layer_s_column_is_filled_by_its_share(results):
    row = a_row("orthorank", [1, 3], 0.25)
    svg = pictures.picture(pictures.layers, "a plan", 400, 64, row, 4, True)
    full = [size(column, 1) for column in shapes(svg, "dense")]
    part = [size(column, 1) for column in shapes(svg, "kept")]
    rest = [size(column, 1) for column in shapes(svg, "left-out")]
    assert full == [pytest.approx(full[0], abs=0.02)] * 2
    assert part == [pytest.approx(0.25 * full[0], abs=0.02)] * 2
    assert rest == [pytest.approx(0.75 * full[0], abs=0.02)] * 2
    titles = re.findall(r"<title>(.*?)</title>", svg)
    assert sorted(set(titles)) == [f"layer {n} updates {share}% of the tokens" for n, share in enumerate([100, 25] * 2)]
    removed = pictures.picture(pictures.layers, "a plan", 400, 64, row | {"keep_ratio": 0.0}, 4, False)
    assert shapes(removed, "kept") == [], "a removed layer has nothing filled"


def test_bars_are_as_long_as_their_values():
    rows = [a_row("dense", [], 1.0, speedup=1.0), a_row("layer-pruning", [1], 0.0, speedup=2.0)]
    rows.append(a_row("orthorank", [1], 0.5, speedup=None))
    svg = pictures.picture(pictures.bars, "sizes", 364, 132, rows, "speedup")
    (dense,), (pruned,) = shapes(svg, "dense"), shapes(svg, "pruned")
    assert size(pruned, 0) == pytest.approx(2 * size(dense, 0), abs=0.05)
    assert re.findall(r">([^<>]+)</text>", svg) == [
        "dense", "1.00x", "layer pruning (SLEB)", "2.00x", "OrthoRank", "-"
    ]  # fmt: skip


def test_a_curve_passes_through_its_values_and_ends_where_the_axis_of_its_model_does():
    def points(values: list[float], **options: Any) -> list[tuple[float, float]]:
        return shapes(pictures.picture(pictures.curve, "a curve", 364, 200, values, 1, 4, **options), "kept")[0]

    found = points([1.0, 10.0, float("nan"), 100.0, -1.0], logarithmic=True)
    assert len(found) == 3, "a value that cannot be shown is left out"
    assert found[0][1] - found[1][1] == pytest.approx(found[1][1] - found[2][1], abs=0.02), "equal factors, equal steps"
    steps = [b[0] - a[0] for a, b in pairwise(found)]
    assert steps[1] == pytest.approx(2 * steps[0], abs=0.02), "layer 2 is missing"
    longer = points([1.0, 10.0, 5.0, 100.0, 7.0])
    assert len(longer) == 5
    assert longer[3][0] - longer[0][0] == pytest.approx(found[2][0] - found[0][0], rel=0.02), "one axis for both"
    nothing = pictures.picture(pictures.curve, "nothing", 364, 200, [float("inf")], None, 4)
    assert "nothing measured" in nothing
    assert "the sink forms" not in nothing


def test_a_scatter_places_points_by_their_figures():
    rows = [a_row("dense", [], 1.0, speedup=1.0, perplexity=20.0)]
    rows.append(a_row("orthorank", [1], 0.5, speedup=1.2, perplexity=30.0))
    rows.append(a_row("layer-pruning", [1], 0.0, speedup=None, perplexity=40.0))
    svg = pictures.picture(pictures.scatter, "two plans", 364, 300, rows)
    points = [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg)]
    assert len(points) == 2, "a plan without a speed is not shown"
    assert points[0][0] < points[1][0]
    assert points[0][1] > points[1][1], "more is higher up"
    assert {"dense", "OrthoRank"} <= set(re.findall(r">([^<>]+)</text>", svg))


def usage(html: str) -> str:
    """The Python on the page."""
    return blocks(html)[0]


def blocks(html: str) -> list[str]:
    """What can be copied on the page."""
    return [unescape(code) for code in re.findall(r'<div class="code">.*?<pre>(.*?)</pre></div>', html, re.DOTALL)]


def test_the_usage_in_the_page_is_python(results):
    code = usage(html_page(results))
    compile(code, "usage", "exec")
    assert "load_model()" in code
    results["settings"]["model"] = "owner/<model>'s"
    code = usage(html_page(results))
    compile(code, "usage", "exec")
    assert """load_model("owner/<model>'s")""" in code


def test_the_next_commands_take_the_corrected_plan_where_there_is_one(results):
    commands = [shlex.split(command) for command in blocks(html_page(results))[1:]]
    assert commands[-1] == ["orthorank", "bench", "--plan", "orthorank-demo/orthorank.json"]
    results["settings"]["model"] = "owner/it's"
    results["corrected_plan_file"] = "a folder/orthorank.json"
    for command, name in zip(blocks(html_page(results))[1:], ("eval", "compare", "bench"), strict=True):
        found = shlex.split(command)
        assert found[:2] == ["orthorank", name]
        assert found[found.index("--plan") - 1 :][:3] == ["owner/it's", "--plan", "a folder/orthorank.json"]


def test_speed_ups_come_with_their_spread_and_with_what_speaks_against_them(results):
    quiet = Page(html_page(results)).text
    assert "FLOPs allow" not in quiet
    results["rows"][2] |= {"speedup": 1.2, "speedup_spread": 0.03}
    assert "1.20x ± 0.03" in Page(html_page(results)).text
    results["rows"][2] |= {"speedup": 1.64}
    assert "OrthoRank: 1.64x is more than the 1.24x that its FLOPs allow" in Page(html_page(results)).text
    results["rows"][2] |= {"speedup": 1.2, "speedup_spread": 0.07}
    assert "differs by 12 %, so 1.20x is not sure" in Page(html_page(results)).text
    assert words.doubts([{"name": "a", "speedup": 1.02, "flop_speedup": 1.0, "speedup_spread": 0.0}]) == []


def test_how_it_was_measured(results):
    page = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html_page(results), re.DOTALL)
    assert {name: " ".join(unescape(value).split()) for name, value in page} == {
        "model": "owner/<model>, from folder",
        "text": "a text, 113,108 tokens, sha256 0123456789ab",
        "OrthoRank": "layers 14-22; greedy search among layers 12-27, 108 evaluations of 512 tokens in 45 s",
        "layer pruning (SLEB)": "layers 3, 5, 7, 9, 11, 20; shipped with the package",
        "perplexity": "16 held-out windows of 512 tokens",
        "speed": "prefill of 2,048 random tokens, batch 1, logits of the last one; medians of 5 interleaved rounds, "
        "wall clock",
        "machine": "a CPU; 2 threads; Python 3.11.7",
        "software": "torch 2.13.0",
        "time": "200 s",
    }


@pytest.mark.parametrize(("module", "remedy"), [("jinja2", "[demo]"), ("matplotlib", "[plot]")])
def test_what_is_missing_is_named_with_its_extra(results, monkeypatch, module, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    pictures._drawn.cache_clear()
    with pytest.raises(OrthoRankError, match=rf"needs {module}; run: pip install '.\{remedy}' in a checkout"):
        html_page(results)


def test_template_and_style_sheet_are_part_of_the_package():
    folder = Path(pictures.__file__).parent
    assert {"page.css", "page.html.j2"} <= {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_text_is_read_on_the_paper(colours):
    for name in ("ink", "soft"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours."""
    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as WCAG defines it."""
    values = [v / 255 for v in bytes.fromhex(colour.removeprefix("#"))]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
