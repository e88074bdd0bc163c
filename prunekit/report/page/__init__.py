"""One page about a run, a family, a study or a comparison: a single file that needs no network.

What is said comes from files of a run (report.json, ledger.jsonl, pareto.json, rows.jsonl); a folder may come from
anywhere, so every word of it is escaped, and no word becomes markup or script.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput, first_line
from prunekit.report.page.charts import Chart
from prunekit.report.page.part import Part
from prunekit.report.page.parts import kind_of, parts_of
from prunekit.report.page.sizes import parts_of_several
from prunekit.system.files import write_bytes

PAGE = "report.html"  # name of the page in a result
NEEDED = ("altair", "vl_convert")
EXTRA = "a page needs altair and vl-convert-python, which are not installed: pip install 'prunekit[page]'"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def can_draw() -> bool:
    """Whether what draws pages is installed."""
    return all(find_spec(name) is not None for name in NEEDED)


def write_page(folders: Sequence[Path], output: Path) -> Path:
    """Write the page of one folder or several.

    Args:
        folders: of results, families, studies or comparisons.
        output: the file.

    Returns:
        The file.

    Raises:
        WrongInput: a folder is none of these, or what draws pages is not installed.
    """
    if not can_draw():
        raise WrongInput(EXTRA)
    parts = [part for i, folder in enumerate(folders) for part in parts_of(folder, f"run-{i}")]
    results = [folder for folder in folders if kind_of(folder) == "result"]
    write_bytes(output, page([*parts_of_several(results), *parts]).encode())
    return output


def add_page(folder: Path, say: Callable[[str], None]) -> None:
    """Write the page of a result into it, or say why there is none: hours of work are not lost for a picture."""
    try:
        write_page([folder], folder / PAGE)
    except Exception as error:
        say(f"no page was made ({type(error).__name__}: {first_line(error)}); the result is whole without it")


def page(parts: Sequence[Part]) -> str:
    """Make the HTML of a page.

    Args:
        parts: in order; every one becomes a section.
    """
    title = parts[0].title if parts else "prunekit"
    charts = {chart.name: chart.spec for part in parts for chart in part.charts}
    links = "".join(f'<li><a href="#{part.anchor}">{html.escape(part.heading)}</a></li>' for part in parts)
    files = resources.files("prunekit.report.page")
    style, script = (files.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="generator" content="prunekit">
<title>{html.escape(title)}</title>
<style>
{style}
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>{html.escape(title)}</h1>
<button type="button" id="theme" aria-pressed="false">Dark</button>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="main" tabindex="-1">
{"".join(_section(part, title) for part in parts)}
</main>
<script type="application/json" id="charts">{_script_safe(charts)}</script>
<script>
{_bundle()}
</script>
<script>
{script}
</script>
</body>
</html>
"""


def _section(part: Part, title: str) -> str:
    same = ' class="hidden"' * (part.heading == title)  # as the line above it
    return (
        f'<section id="{part.anchor}" aria-labelledby="{part.anchor}-h"><h2 id="{part.anchor}-h"{same}>'
        f"{html.escape(part.heading)}</h2>{part.before}{''.join(map(_figure, part.charts))}{part.after}</section>\n"
    )


def _figure(chart: Chart) -> str:
    said = html.escape(chart.description)
    style = f' style="min-width: {chart.least}px"' if chart.least else ""
    drawn = f'<div class="chart" id="{chart.name}" role="img" aria-label="{said}"{style}></div>'
    if chart.least:
        drawn = f'<div class="wide" tabindex="0" role="group" aria-label="{html.escape(chart.caption)}">{drawn}</div>'
    return f"<figure><figcaption>{html.escape(chart.caption)}</figcaption>{drawn}</figure>"


def _script_safe(value: Mapping[str, Any]) -> str:
    """JSON that ends no script and begins no comment, whatever its strings say."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and what embeds them, as a script that puts `vegaEmbed` into the page."""
    import vl_convert

    made = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return str(made).replace("</script", "<\\/script")
