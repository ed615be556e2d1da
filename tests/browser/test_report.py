"""The report in a real browser: nothing on its console, nothing wider than the screen, the map's tokens are the text.

Run by ``make test-browser``, which asks for Chromium where there is none.
"""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from orthorank.report import html_page
from tests.orthorank.report.test_report import results  # noqa: F401 - a fixture

pytestmark = pytest.mark.browser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
TEXT = "A word, <b>another</b> word & naïve 日本語 words.\nA second line of it, " + "which is long " * 12

# Runs in the page, after it is laid out: measures, moves the focus, and leaves what it saw in the title.
LOOK = """<script>
addEventListener("load", () => {
  const tokens = [...document.querySelectorAll(".tokens .token")];
  const seen = {
    inner: window.innerWidth,
    wide: document.documentElement.scrollWidth,
    text: document.querySelector(".tokens").textContent,
    focusable: tokens.filter(t => { t.focus(); return document.activeElement === t; }).length,
    detail: getComputedStyle(tokens[1], "::after").content,
    shades: [0, 3, 6].map(n => getComputedStyle(document.querySelector(".legend .shade" + n)).backgroundColor),
    paper: getComputedStyle(document.body).backgroundColor,
    bar: getComputedStyle(document.querySelector('svg path[style*="fill: #0f766e"]')).fill,
    hover: document.querySelector(".wide svg title").textContent,
  };
  tokens[1].focus();
  seen.detail = getComputedStyle(tokens[1], "::after").content;
  document.title = JSON.stringify(seen);
});
</script>"""


@pytest.fixture
def page(results: dict[str, Any]) -> str:  # noqa: F811
    pieces = re.findall(r"\s?\S+|\s", TEXT)
    found = {"pieces": pieces, "layers": [list(range(n % 10)) for n in range(len(pieces))], "selecting": list(range(9))}
    return html_page(results | {"token_map": found})


def browse(folder: Path, html: str, width: int, *options: str) -> tuple[dict[str, Any], str]:
    """What `LOOK` saw, and the browser's log."""
    if CHROMIUM is None:
        pytest.fail("there is no Chromium; on Debian and Ubuntu: apt-get install chromium")
    file = folder / f"page-{width}.html"
    file.write_text(html.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    size = [f"--window-size={width},2000", f"--user-data-dir={folder / f'profile-{width}'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, *size, *options, file.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stdout[:500]
    return json.loads(unescape(title.group(1))), done.stderr


@pytest.mark.parametrize("width", [500, 1440])
def test_the_page_fits_and_is_silent(tmp_path: Path, page: str, width: int) -> None:
    seen, log = browse(tmp_path, page, width)
    assert seen["inner"] == width
    assert seen["wide"] <= width, "something is wider than the screen"
    assert "CONSOLE" not in log, log
    assert seen["text"] == "".join(re.findall(r"\s?\S+|\s", TEXT))


def test_a_phone(tmp_path: Path, page: str) -> None:
    """Chromium's windows are no narrower than 500 pixels; a frame of 360 stands for a phone."""
    inner = page.replace("</body>", f"{LOOK}</body>".replace("document.title =", "parent.document.title ="))
    (tmp_path / "inner.html").write_text(inner, encoding="utf-8")
    frame = '<!doctype html><title></title><body style="margin:0"><iframe src="inner.html" width="360" height="3000">'
    (tmp_path / "frame.html").write_text(f"{frame}</iframe></body>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    seen = json.loads(unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL).group(1)))  # type: ignore[union-attr]
    assert seen["inner"] in (356, 360), "the frame may have a border"
    assert seen["wide"] <= seen["inner"]


def test_every_token_is_reached_by_the_keyboard_and_says_its_layers(tmp_path: Path, page: str) -> None:
    seen, _ = browse(tmp_path, page, 1000)
    assert seen["focusable"] == len(re.findall(r"\s?\S+|\s", TEXT))
    assert "token 1, updated in 1 of 9 layers: 0" in seen["detail"]


def test_shades_differ_in_light_and_dark(tmp_path: Path, page: str) -> None:
    light, _ = browse(tmp_path, page, 900)
    dark, _ = browse(tmp_path, page, 901, "--blink-settings=preferredColorScheme=0")
    assert light["paper"] != dark["paper"]
    assert (light["bar"], dark["bar"]) == ("rgb(15, 118, 110)", "rgb(45, 212, 191)"), "a picture's own colour"
    assert light["hover"] == "layer 3 updates 0% of the tokens"
    for seen in (light, dark):
        assert len(set(seen["shades"])) == 3
