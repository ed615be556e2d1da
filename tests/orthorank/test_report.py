"""The page is read back: structure, figures, and what it says when OrthoRank is the worse choice."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orthorank.report import html_page, words
from orthorank.report.charts import Marks, line_chart, linear_ticks, log_ticks
from orthorank.report.pictures import bars, layer_stacks

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
        "quality": {"windows": 16, "seq_len": 512, "log_ratio_standard_error": 0.01},
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
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    assert "@import" not in html
    assert "url(" not in html
    assert page.count("meta", name="viewport", content="width=device-width, initial-scale=1") == 1


def test_the_page_has_colours_for_light_and_dark_for_each_name_it_uses(results):
    html = html_page(results)
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    defined = [set(re.findall(r"(--[a-z-]+):", block)) for block in (light, dark)]
    assert defined[0] == defined[1] == set(re.findall(r"var\((--[a-z-]+)\)", html))
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


def test_pictures_come_in_two_widths_with_words_for_those_who_cannot_see_them(results):
    page = Page(html_page(results))
    pictures = [a for tag, a in page.tags if tag == "svg"]
    assert len(pictures) == 2 * (2 + 1 + 1 + 3), "two of bars, speed against quality, the layers, the sink"
    assert all(a["role"] == "img" and a["aria-label"] for a in pictures)
    narrow = [int(a["width"] or 0) for a in pictures[1::2]]
    assert max(narrow) <= 360 - 2 * 16, "wider than a phone's page"


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


def test_charts_of_one_model_share_their_axis():
    marks = Marks(last=4)
    ends = [re.findall(r" ([\d.]+),", line_chart([1.0] * n, 342, "x", marks))[-1] for n in (5, 3)]
    assert [float(x) for x in ends] == [330.0, pytest.approx(42 + 288 / 2)]


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
    results["quality"]["log_ratio_standard_error"] = error
    assert said in words.verdict(results)


def test_the_verdict_without_layer_pruning(results):
    del results["rows"][1]
    assert "removed" not in words.verdict(results)
    assert words.verdict(results).startswith(
        "At 20 % sparsity OrthoRank has a perplexity of 50.00, the dense model 21.15"
    )


def test_layer_stacks_fill_each_column_by_its_share():
    rows = [{"title": "a plan", "layers": [1, 3], "keep_ratio": 0.25}]
    picture = layer_stacks(rows, 4, 400)
    assert picture.count("<g>") == 4
    heights = {css: re.findall(rf'class="{css}"[^>]*height="([\d.]+)"', picture) for css in ("dense", "kept")}
    assert heights == {"dense": ["44", "44"], "kept": ["11", "11"]}
    assert "layer 3 updates 25% of the tokens" in picture
    assert "kept" not in layer_stacks([rows[0] | {"keep_ratio": 0.0}], 4, 400), "a removed layer has nothing filled"


def test_bars_are_as_long_as_their_values():
    picture = bars([("a", 10.0, "10", "dense"), ("b", 5.0, "5", "kept"), ("c", None, "-", "kept")], 264, "sizes")
    assert re.findall(r'<rect[^>]*width="([\d.]+)"', picture) == ["200", "100"]
    assert 'aria-label="sizes: a 10, b 5, c -"' in picture


def test_a_line_passes_through_its_values():
    picture = line_chart([1.0, 10.0, float("nan"), 100.0], 342, "ratios", Marks(at=1, words="here"), logarithmic=True)
    points = re.search(r'<polyline[^>]*points="([^"]+)"', picture)
    assert points is not None
    xy = [tuple(map(float, point.split(","))) for point in points[1].split()]
    assert len(xy) == 3, "a value that is not finite is left out"
    assert xy[0][1] - xy[1][1] == pytest.approx(xy[1][1] - xy[2][1]), "factors of ten are equal steps"
    assert ">here</text>" in picture
    assert "nothing measured" in line_chart([float("inf")], 300, "nothing")


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.989, 0.991], [-3.0, 7.0], [5.0, 5.0], [0.0], [1e-4, 1234.0]])
def test_ticks_enclose_the_values(values):
    ticks = linear_ticks(values)
    assert ticks[0] <= min(values) + 1e-9
    assert ticks[-1] >= max(values) - 1e-9
    assert 2 <= len(ticks) <= 9
    if min(values) > 0:
        powers = log_ticks(values)
        assert powers[0] * 0.89 <= min(values)
        assert powers[-1] >= max(values)


def test_the_usage_in_the_page_is_python(results):
    compile(words.usage(results), "usage", "exec")
    assert "load_model()" in words.usage(results)
    results["settings"]["model"] = "owner/model"
    assert "load_model('owner/model')" in words.usage(results)


def test_the_style_sheet_is_part_of_the_package():
    assert (Path(words.__file__).parent / "page.css").is_file()
