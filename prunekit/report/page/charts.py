"""The charts of a page, by Altair, as Vega-Lite. Colours are Okabe and Ito's, which colour-blind people tell apart;
ink has the colour of the text around, so that a chart is readable in light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8c8c8c"
INK = "currentColor"
MANY = [BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9", "#e69f00", GREY]
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {"labelColor": INK, "titleColor": INK, "tickColor": INK, "domainColor": INK, "gridColor": INK,
             "gridOpacity": 0.15, "labelFontSize": 12, "titleFontSize": 12, "labelLimit": 400},
    "legend": {"labelColor": INK, "titleColor": INK, "orient": "top", "labelFontSize": 12, "titleFontSize": 12,
               "labelLimit": 400, "symbolLimit": 40},
    "header": {"labelColor": INK, "titleColor": INK},
    "title": {"color": INK},
    "text": {"color": INK},
}  # fmt: skip
SHOWN = 20  # lines of a picture at most, and rows of a long table before all are asked for
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A picture, and what it shows in words."""

    name: str  # id in the page
    caption: str
    description: str  # for who cannot see it
    spec: Mapping[str, Any]  # Vega-Lite
    least: int = 0  # pixels that it is wide at least: in a narrower window it scrolls


def _made(name: str, caption: str, description: str, chart: Any, height: int = 260) -> Chart:
    spec = chart.properties(width="container", height=height).to_dict()
    spec |= {"config": CONFIG, "description": description}
    return Chart(name, caption, description, spec)


def _tall(rows: Sequence[object]) -> int:
    """Enough for a line of text each."""
    return 24 * max(1, len(rows))


def _first(rows: Sequence[object], of: int | None) -> str:
    """How many of them are shown, where not all are."""
    return "" if of is None or of <= len(rows) else f", the first {len(rows)} of {of:,}"


def _kinds(alt: Any, rows: Rows) -> Any:
    kinds = {"attention": BLUE, "mlp": ORANGE}
    kinds |= {"mixer": GREEN} if any(row["kind"] == "mixer" for row in rows) else {}
    return alt.Color("kind:N", title=None, scale=alt.Scale(domain=[*kinds], range=[*kinds.values()]))


def layers(name: str, rows: Rows) -> Chart:
    """What every block keeps of its attention and its MLP."""
    import altair as alt

    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("block:O", title="block", sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        xOffset=alt.XOffset("kind:N", sort=None),
    )
    whole = base.mark_bar(fill=None, stroke=GREY, strokeOpacity=0.6).encode(
        y=alt.Y("whole:Q", title="kept", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    ).transform_calculate(whole="1")  # fmt: skip
    kept = base.mark_bar().encode(
        y="share:Q", color=_kinds(alt, rows),
        tooltip=["block:O", "kind:N", "kept:Q", "groups:Q", alt.Tooltip("error:Q", format=".4f")],
    )  # fmt: skip
    whole_kept = sum(row["share"] for row in rows) / max(1, len(rows))
    return _made(
        name, "What every block keeps; the outline is the dense model",
        f"Bars of the share of attention groups and neurons kept in each of {len({r['block'] for r in rows})} blocks; "
        f"{whole_kept:.0%} on average. The table of sites has the numbers.",
        alt.layer(whole, kept),
    )  # fmt: skip


def errors(name: str, rows: Rows) -> Chart:
    """Error against what is kept, a line per site."""
    import altair as alt

    chart = alt.Chart(alt.Data(values=list(rows))).mark_line(opacity=0.55, strokeWidth=1.3).encode(
        x=alt.X("share:Q", title="kept", axis=alt.Axis(format="%")),
        y=alt.Y("error:Q", title="relative error", scale=alt.Scale(type="sqrt")),
        color=_kinds(alt, rows), detail="site:N", tooltip=["site:N", alt.Tooltip("share:Q", format=".0%"), "error:Q"],
    )  # fmt: skip
    return _made(
        name, "Error of every site against what it keeps",
        f"Lines that fall from few kept groups to all, for {len({row['site'] for row in rows})} sites.", chart,
    )  # fmt: skip


def search(name: str, rows: Rows) -> Chart:
    """The losses of all questions, and the lowest so far."""
    import altair as alt

    data = alt.Data(values=list(rows))
    x = alt.X("tokens:Q", title="token-forwards", axis=alt.Axis(format="~s"))
    dots = alt.Chart(data).mark_circle(opacity=0.5, size=28).encode(
        x=x, y=alt.Y("loss:Q", title="objective", scale=alt.Scale(zero=False)),
        color=alt.Color("on:N", title="judged on", scale=alt.Scale(range=[GREY, BLUE, GREEN, ORANGE])),
        tooltip=["tokens:Q", "loss:Q", "on:N"],
    )  # fmt: skip
    line = alt.Chart(data).mark_line(interpolate="step-after", color=ORANGE, strokeWidth=2).encode(x=x, y="lowest:Q")
    least = min((row["lowest"] for row in rows if row["lowest"] is not None), default=float("nan"))
    return _made(
        name, "The search as it went; the line is the lowest loss so far on the most tokens",
        f"{len(rows)} judged allocations over {rows[-1]['tokens']:,} token-forwards; the lowest loss is {least:.4g}.",
        dots + line,
    )  # fmt: skip


def cost(name: str, rows: Rows) -> Chart:
    """Seconds by stage."""
    import altair as alt

    chart = alt.Chart(alt.Data(values=list(rows))).mark_bar(color=BLUE).encode(
        y=alt.Y("stage:N", title=None, sort="-x"), x=alt.X("seconds:Q", title="seconds"),
        tooltip=["stage:N", alt.Tooltip("seconds:Q", format=",.1f")],
    )  # fmt: skip
    said = ", ".join(f"{row['stage']} {row['seconds']:,.1f}" for row in rows)
    return _made(name, "Seconds by stage", f"Seconds: {said}.", chart, _tall(rows))


def front(name: str, rows: Rows, size: str, loss: str = "perplexity") -> Chart:
    """Two things of which both are better when lower, such as size and perplexity."""
    import altair as alt

    data = alt.Data(values=[row for row in rows if row[loss] is not None])
    x = alt.X(f"{size}:Q", title=size, scale=alt.Scale(zero=False), axis=alt.Axis(format="~s"))
    y = alt.Y(f"{loss}:Q", scale=alt.Scale(zero=False))
    line = alt.Chart(data).mark_line(color=GREY).encode(x=x, y=y).transform_filter("datum.front")
    dots = alt.Chart(data).mark_point(filled=True, size=80).encode(
        x=x, y=y, tooltip=["name:N", f"{size}:Q", f"{loss}:Q"],
        color=alt.Color("front:N", title="on the front", scale=alt.Scale(domain=[True, False], range=[BLUE, GREY])),
    )  # fmt: skip
    names = alt.Chart(data).mark_text(dy=-10, color=INK).encode(x=x, y=y, text="name:N")
    said = "; ".join(f"{row['name']}: {row[size]:,}, {row[loss]}" for row in rows)
    return _made(name, f"{size} against {loss}", f"Points: {said}.", line + dots + names)


def trials(name: str, rows: Rows, metric: str) -> Chart:
    """What every recipe of a study has, and the lowest so far."""
    import altair as alt

    data = alt.Data(values=list(rows))
    x = alt.X(
        "trial:Q",
        title="recipe, in the order of the study; 0 is the base",
        axis=alt.Axis(format="d", tickMinStep=1),
        scale=alt.Scale(nice=False, padding=16),
    )
    dots = alt.Chart(data).mark_point(filled=True, size=50, color=BLUE).encode(
        x=x, y=alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False)), tooltip=["name:N", "value:Q"],
    )  # fmt: skip
    line = alt.Chart(data).mark_line(interpolate="step-after", color=ORANGE, strokeWidth=2).encode(x=x, y="lowest:Q")
    return _made(
        name, f"{metric} of every recipe; the line is the lowest so far",
        f"{len(rows)} recipes; the base has {rows[0]['value']:.4g}, the lowest is {rows[-1]['lowest']:.4g}.",
        dots + line,
    )  # fmt: skip


def choice(name: str, key: str, rows: Rows, metric: str) -> Chart:
    """What came of the values of one key."""
    import altair as alt

    numbers = all(isinstance(row["choice"], int | float) for row in rows)
    values = [row["choice"] for row in rows]
    wide = numbers and min(values) > 0 and max(values) / min(values) > 30
    scale = alt.Scale(type="log", nice=False, padding=16) if wide else alt.Scale(zero=False, padding=16)
    x = (
        alt.X("choice:Q", title=key, scale=scale)
        if numbers
        else alt.X("choice:N", title=key, axis=alt.Axis(labelAngle=0))
    )
    chart = alt.Chart(alt.Data(values=list(rows))).mark_point(filled=True, size=50, color=BLUE, opacity=0.7).encode(
        x=x, y=alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False)), tooltip=["name:N", "choice:N", "value:Q"],
    )  # fmt: skip
    best = min(rows, key=lambda row: row["value"])
    return _made(
        name, f"{metric} by {key}", f"{len(rows)} recipes; the lowest, {best['value']:.4g}, has {best['choice']}.",
        chart, 200,
    )  # fmt: skip


def grid(name: str, rows: Rows, sides: tuple[str, str], where: str, most: float) -> Chart:
    """A heat map of two sides of a grid: how far every cell is above the best.

    Args:
        name: of the chart.
        rows: of every cell `row`, `column`, `above` in nats, `perplexity`, `interval` and `mark`; rows and columns in
            the order in which they are drawn.
        sides: what rows and columns are.
        where: of the grid among several, in words, or nothing.
        most: nats from which on all have the same colour.
    """
    import altair as alt

    data = alt.Data(values=list(rows))
    across, down = (list(dict.fromkeys(str(each[key]) for each in rows)) for key in ("column", "row"))
    x = alt.X("column:N", title=None, scale=alt.Scale(domain=across), axis=alt.Axis(orient="top", labelAngle=-60))
    y = alt.Y("row:N", title=None, scale=alt.Scale(domain=down))
    said = [alt.Tooltip("cell:N"), alt.Tooltip("perplexity:Q", format=",.2f"),
            alt.Tooltip("interval:N", title="log ratio to the best"), alt.Tooltip("state:N")]  # fmt: skip
    color = alt.Color(
        "above:Q", title="log ratio to the best", scale=alt.Scale(
            scheme="viridis", reverse=True, domain=[0, most], clamp=True),
        legend=alt.Legend(values=[0, most / 2, most], format=".2f", gradientLength=220,
                          labelExpr=f"datum.value == {most} ? datum.label + ' and more' : datum.label"),
    )  # fmt: skip
    tiles = alt.Chart(data).mark_rect(stroke=None).encode(x=x, y=y, color=color, tooltip=said)
    tiles = tiles.transform_filter("datum.above !== null")
    signs = alt.Chart(data).mark_text(fontSize=13, fontWeight="bold").encode(
        x=x, y=y, text="mark:N", tooltip=said,
        color=alt.condition("datum.above === null", alt.value(INK), alt.value("#000")),
    ).transform_filter("datum.mark !== ''")  # fmt: skip
    marks = {"1": "1 is the best", "=": "= is not separated from the best", "×": "× has no result"}
    meant = ", ".join(words for mark, words in marks.items() if any(each["mark"] == mark for each in rows))
    tied, best = sum(each["mark"] == "=" for each in rows), next((r for r in rows if r["mark"] == "1"), None)
    first = f"The best, {best['cell']}, is among them. " if best else ""
    made = _made(
        name,
        f"Every {sides[0]} with every {sides[1]}{where}: the brighter, the nearer to the best. "
        f"{meant and meant + '. '}Rows and columns are in the order of their medians, the best first.",
        f"Heat map of {len(down)} by {len(across)}{where}. {first}{tied} are marked = because they are not separated "
        f"from the best. The best {sides[0]} by its median is {down[0]}, the best {sides[1]} {across[0]}. The table "
        "below the picture has the numbers.",
        alt.layer(tiles, signs), max(160, 22 * len(down)),
    )  # fmt: skip
    return replace(made, least=7 * max(map(len, down)) + 24 * len(across))


def intervals(name: str, rows: Rows, of: int | None = None) -> Chart:
    """Differences with their intervals, the best first; `of`: how many there are, where these are the first of them."""
    import altair as alt

    data = alt.Data(values=[row for row in rows if row["low"] is not None])
    order = [row["cell"] for row in rows]
    y = alt.Y("cell:N", title=None, sort=None, scale=alt.Scale(domain=order))
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color=INK, strokeDash=[3, 3]).encode(x="x:Q")
    words = ["not separated from the best", "worse than the best"]
    color = alt.Color("tied:N", title=None, scale=alt.Scale(domain=words, range=[BLUE, ORANGE]))
    shape = alt.Shape("tied:N", title=None, scale=alt.Scale(domain=words, range=["circle", "square"]))
    title = "log ratio to uniform; left is better"
    bars = alt.Chart(data).mark_rule(strokeWidth=2).encode(
        y=y, x=alt.X("low:Q", title=title), x2="high:Q", color=color,
    )  # fmt: skip
    dots = alt.Chart(data).mark_point(filled=True, size=60).encode(
        y=y, x="mean:Q", color=color, shape=shape,
        tooltip=["cell:N", alt.Tooltip("mean:Q", format="+.4f"), alt.Tooltip("low:Q", format="+.4f"),
                 alt.Tooltip("high:Q", format="+.4f")],
    )  # fmt: skip
    return _made(
        name, f"Differences with 95 % intervals{_first(rows, of)}",
        "The numbers are in the columns of the leaderboard.",
        zero + bars + dots, _tall(rows),
    )  # fmt: skip


def tradeoff(name: str, rows: Rows) -> Chart:
    """Seconds against perplexity; points that are `named` have their cell's name beside them."""
    import altair as alt

    data = alt.Data(values=list(rows))
    x = alt.X("seconds:Q", title="seconds", scale=alt.Scale(type="log", nice=False, padding=24))
    y = alt.Y("perplexity:Q", scale=alt.Scale(type="log", nice=False, padding=24))
    dots = alt.Chart(data).mark_point(filled=True, size=60, color=BLUE).encode(
        x=x, y=y, tooltip=["cell:N", "seed:O", alt.Tooltip("seconds:Q", format=",.1f"), "perplexity:Q", "tokens:Q"],
    )  # fmt: skip
    names = (
        alt.Chart(data)
        .mark_text(dx=5, dy=-7, align="left", fontSize=11, color=INK)
        .encode(x=x, y=y, text="cell:N")
        .transform_filter("datum.named")
    )
    some = any(not row["named"] and not row["seed"] for row in rows)
    few = "; with a name, what nothing faster comes near" if some else ""
    return _made(
        name, f"Perplexity against seconds, both on logarithmic axes{few}",
        "The numbers are in the columns of the leaderboard.", dots + names, 320,
    )  # fmt: skip


def anytime(name: str, rows: Rows, of: int | None = None) -> Chart:
    """The lowest loss so far against token-forwards; `of`: how many cells search, where these are the first of them."""
    import altair as alt

    cells = list(dict.fromkeys(str(row["cell"]) for row in rows))
    legend = alt.Legend(columns=1) if len(cells) > 3 else alt.Legend()

    chart = alt.Chart(alt.Data(values=list(rows))).mark_line(interpolate="step-after", point=True).encode(
        x=alt.X("tokens:Q", title="token-forwards", axis=alt.Axis(format="~s"),
                scale=alt.Scale(type="log", nice=False, padding=16)),
        y=alt.Y("loss:Q", title="lowest objective so far", scale=alt.Scale(zero=False)),
        color=alt.Color("cell:N", title=None, scale=alt.Scale(range=MANY), legend=legend),
        strokeDash=alt.StrokeDash("cell:N", title=None, legend=legend),
        tooltip=["cell:N", "tokens:Q", "loss:Q"],
    )  # fmt: skip
    caption = f"What a search has at any time{_first(cells, of)}"
    return _made(name, caption, f"Steps down for {', '.join(cells)}.", chart)


def ranks(name: str, mean: Mapping[str, float], critical: float) -> Chart:
    """Mean ranks, each with the critical difference to its right."""
    import altair as alt

    order = sorted(mean.items(), key=lambda x: x[1])
    rows = [{"cell": cell, "rank": rank, "to": rank + critical} for cell, rank in order[:SHOWN]]
    data, y = (
        alt.Data(values=rows),
        alt.Y("cell:N", title=None, sort=None, scale=alt.Scale(domain=[row["cell"] for row in rows])),
    )
    bars = (
        alt.Chart(data)
        .mark_rule(color=GREY, strokeWidth=2)
        .encode(y=y, x=alt.X("rank:Q", title="mean rank"), x2="to:Q")
    )
    dots = (
        alt.Chart(data)
        .mark_point(filled=True, size=60, color=BLUE)
        .encode(y=y, x="rank:Q", tooltip=["cell:N", "rank:Q"])
    )
    said = ", ".join(f"{row['cell']} {row['rank']:.2f}" for row in rows)
    return _made(
        name,
        f"Mean ranks{_first(rows, len(order))}; ranks within a bar are not separated from its left end",
        f"{said}.",
        bars + dots,
        _tall(rows),
    )
