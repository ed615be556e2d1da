"""The HTML page of a run: one file without scripts or links to load, for light and dark, narrow and wide screens."""

from collections.abc import Callable
from html import escape
from importlib.resources import files

from orthorank.report import words
from orthorank.report.charts import Marks, line_chart
from orthorank.report.pictures import bars, layer_stacks
from orthorank.report.scatter import Point, scatter
from orthorank.report.token_map import token_map_html
from orthorank.report.words import Results

WIDE, NARROW = 760, 326  # pixels: the page's column, and what a phone of 360 pixels shows
COLOURS = {"dense": "dense", "layer-pruning": "pruned", "orthorank": "kept"}


def html_page(results: Results) -> str:
    """The page for ``results`` as the demo writes them, complete or not.

    Args:
        results: the content of ``results.json``.

    Returns:
        An HTML document as text.
    """
    parts = [
        f"<h1>OrthoRank on {escape(results['model']).replace('/', '/<wbr>').replace('-', '-<wbr>')}</h1>",
        f'<p class="soft">{escape(_subtitle(results))}</p>',
        f'<p class="verdict">{escape(words.verdict(results)).replace(" %", "&nbsp;%")}</p>',
        *(section(results) for section in (_table, _measured, _pareto, _layers, _tokens, _sink, _usage, _method)),
    ]
    css = files("orthorank.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>OrthoRank on {escape(results['model'])}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _subtitle(results: Results) -> str:
    model, date = results.get("model_info", {}), str(results.get("created", ""))[:10]
    shape = f"{model.get('num_hidden_layers')} layers, {model.get('parameters', 0) / 1e6:,.0f} M weights"
    state = "" if results.get("complete") else ", ended early"
    return f"{shape}, {model.get('dtype')} on {model.get('device')}, {date}{state}"


def _table(results: Results) -> str:
    if not results.get("rows"):
        return ""
    heads = ("", "layers changed", "perplexity", "tokens/s", "speed-up", "FLOP-ideal")
    rows = []
    for row in results["rows"]:
        cells = zip(heads[1:], words.cells(row)[1:], strict=True)
        data = "".join(f'<td data-label="{head}"><span>{escape(cell)}</span></td>' for head, cell in cells)
        rows.append(f'<tr><th scope="row"><span>{escape(words.TITLES[row["name"]])}</span></th>{data}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    note = (
        "Perplexity: lower is better, on text that did not choose the layers. Tokens/s: prefill of a prompt. "
        "FLOP-ideal: the speed-up if time were proportional to floating-point operations."
    )
    return (
        f"<h2>Result</h2>\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n"
        f'</table>\n<p class="soft" style="margin-top:10px">{note}</p>'
    )


def _measured(results: Results) -> str:
    rows = results.get("rows", [])
    if not any(row.get("perplexity") for row in rows):
        return ""

    def figure(key: str, title: str) -> str:
        entries = [
            (words.TITLES[row["name"]], row.get(key), words.shown(key, row.get(key)), COLOURS[row["name"]])
            for row in rows
        ]
        picture = _both(lambda width: bars(entries, width, title), wide=WIDE // 2 - 16)
        return f"<figure><figcaption>{title}</figcaption>{picture}</figure>"

    left, right = figure("perplexity", "Perplexity: lower is better"), figure("speedup", "Prefill speed-up, measured")
    return f'<div class="pair">{left}{right}</div>'


def _pareto(results: Results) -> str:
    points = [
        Point(row["speedup"], row["perplexity"], words.TITLES[row["name"]], COLOURS[row["name"]])
        for row in results.get("rows", [])
        if row.get("perplexity") and row.get("speedup")
    ]
    if len(points) < 2:
        return ""
    axes = ("measured prefill speed-up", "perplexity")
    picture = _both(lambda width: scatter(points, width, *axes))
    return f"<figure><figcaption>Quality against speed: better is down and to the right</figcaption>{picture}</figure>"


def _tokens(results: Results) -> str:
    found = results.get("token_map")
    if not found:
        return ""
    words_of_it = (
        "The beginning of the held-out text. The stronger a token's colour, the more of the selecting layers updated "
        "it; hover over it, or move to it with the Tab key, to see which."
    )
    return f"<h2>The selected tokens</h2>\n<p>{words_of_it}</p>\n{token_map_html(found)}"


def _layers(results: Results) -> str:
    plans = [{"name": name, **plan} for name, plan in results.get("plans", {}).items()]
    changed = [row for row in results.get("rows") or plans if row["layers"]]
    rows = [row | {"title": words.plan_title(row)} for row in changed]
    if not rows:
        return ""
    total = results["model_info"]["num_hidden_layers"]
    picture = _both(lambda width: layer_stacks(rows, total, width))
    caption = (
        "One column per layer, the first on the left. The filled part is the share of the tokens that the layer "
        "updates; both plans leave out about the same share of all token updates."
    )
    return f"<h2>The chosen layers</h2>\n<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _sink(results: Results) -> str:
    sink = results.get("sink")
    if not sink:
        return ""
    at = sink.get("sink_layer")
    marks = Marks(at, words="" if at is None else "the sink forms", last=len(sink["ratios"]) - 1)

    def figure(key: str, caption: str, logarithmic: bool = False) -> str:
        picture = _both(lambda width: line_chart(sink[key], width, caption, marks, logarithmic))
        return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"

    return "\n".join(
        [
            "<h2>The sink token, layer by layer</h2>",
            f"<p>{escape(words.sink_sentence(sink))}</p>",
            figure("ratios", "Norm of the first token's state over the median norm of the others.", logarithmic=True),
            figure("cos_self", "Cosine of its normalised state with that in the next layer."),
            figure("cos_others", "Mean cosine with the other tokens' normalised states."),
        ]
    )


def _usage(results: Results) -> str:
    if not results.get("plan_file"):
        return ""
    return f"<h2>Use the plan</h2>\n<pre>{escape(words.usage(results))}</pre>"


def _method(results: Results) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in words.how_measured(results))
    return f"<h2>How this was measured</h2>\n<dl>{facts}</dl>"


def _both(picture: Callable[[int], str], wide: int = WIDE, narrow: int = NARROW) -> str:
    """The picture in two sizes, of which the page shows the one that fits the screen."""
    return f'<div class="wide">{picture(wide)}</div><div class="narrow">{picture(narrow)}</div>'
