"""Figures: one palette for light and dark, SVG that stands alone, and committed pictures that show the results."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import readme_figures
from orthorank.common.plot import DARK, LIGHT, dark_rules, layer_strip, new_figure, save, svg

ROOT = Path(__file__).resolve().parents[3]
IMAGES = sorted((ROOT / "docs/images").glob("*.svg"))


def strip(alone: bool) -> str:
    with new_figure(400, 80) as figure:
        axes = figure.subplots()
        layer_strip(axes, [1.0, 0.25, 0.0])
        axes.set_title("<a plan> & its layers")
        return svg(figure, 'a "plan"', alone)


def test_each_colour_has_one_for_the_dark_and_is_found_by_its_value() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT), "two names of one colour would have the same colour in the dark"
    for name, colour in LIGHT.items():
        for what in ("fill", "stroke"):
            assert f'[style*="{what}: {colour}"] {{ {what}: {DARK[name]} !important }}' in dark_rules()


@pytest.mark.parametrize("alone", [False, True])
def test_svg_is_small_and_the_same_each_time(alone: bool) -> None:
    text = strip(alone)
    assert text == strip(alone)
    assert len(text) < 8000
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == 'a "plan"'
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[-1] == "<a plan> & its layers", "text stays text"
    assert not re.findall(r'<g id="', text), "numbers that every figure of a page would have again"
    used = set(re.findall(r"(?:fill|stroke): (\w+|#\w+)", text.replace(dark_rules(), "")))
    assert used <= {"none", *LIGHT.values()}
    assert ("prefers-color-scheme" in text) == (LIGHT["paper"] in text.replace(dark_rules(), "")) == alone


def test_both_files_are_written_in_one_step(tmp_path: Path) -> None:
    with new_figure(100, 50) as figure:
        figure.subplots()
        paths = save(figure, tmp_path, "empty")
    assert [path.name for path in paths] == ["empty.png", "empty.svg"]
    assert sorted(tmp_path.iterdir()) == sorted(paths), "no part is left"
    assert ElementTree.parse(paths[1]).getroot().attrib["aria-label"] == "empty"


def test_the_style_ends_with_the_figure() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    strip(alone=True)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_committed_pictures_need_no_variables_and_have_colours_for_the_dark(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "var(" not in text, "a viewer without CSS variables would draw it black"
    ElementTree.fromstring(text)
    light = text.replace(dark_rules(), "")
    assert LIGHT["paper"] in light
    assert LIGHT["ink"] in light
    dark = text.split("@media (prefers-color-scheme: dark)")[1]
    assert DARK["paper"] in dark
    assert DARK["ink"] in dark


def words(text: str) -> list[str]:
    """What a picture says; not where: fonts differ."""
    return re.findall(r">([^<>{}]+)</t(?:ext|span|itle)>|aria-label=\"([^\"]*)\"", text)


def test_the_pictures_of_the_pages_are_those_of_the_committed_results() -> None:
    demo = readme_figures.draw_demo(json.loads(readme_figures.DEMO.read_text(encoding="utf-8")))
    assert words((readme_figures.IMAGES / "demo.svg").read_text(encoding="utf-8")) == words(demo)
    mechanism = (readme_figures.IMAGES / "mechanism.svg").read_text(encoding="utf-8")
    assert words(mechanism) == words(readme_figures.draw_mechanism())


def test_the_pictures_of_the_reproduction_are_those_of_its_results(tmp_path: Path) -> None:
    if not list(readme_figures.SUMMARY.parent.glob("*.png")):
        pytest.skip("the pictures of the reproduction are in a checkout, not in the source archive")
    drawn = readme_figures.draw_reproduction(json.loads(readme_figures.SUMMARY.read_text(encoding="utf-8")), tmp_path)
    for path in drawn:
        committed = readme_figures.SUMMARY.parent / path.name
        assert committed.is_file()
        if path.suffix == ".svg":
            assert words(committed.read_text(encoding="utf-8")) == words(path.read_text(encoding="utf-8"))
    for name, of in readme_figures.SHOWN.items():
        assert (readme_figures.IMAGES / name).read_bytes() == (readme_figures.SUMMARY.parent / of).read_bytes()
