"""The charts of a page, by Altair, as Vega-Lite. Colours are those of the page's style sheet, which has them for light
and dark; shapes, dashes, places or a table tell apart what colours do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

BLUE, ORANGE, GREEN, PURPLE = "var(--blue)", "var(--orange)", "var(--green)", "var(--purple)"
GREY, INK = "var(--grey)", "currentColor"
MANY = [BLUE, ORANGE, GREEN, PURPLE, "var(--brown)", "var(--violet)", GREY]
DASHES = [[1, 0], [6, 3], [2, 2], [9, 3, 2, 3], [12, 4], [4, 4, 1, 4], [1, 3]]  # as many, for lines
SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right"]  # and for points
PARTS = {"attention": 0, "MLP": 1, "mixer": 2, "experts": 3}  # of a block, with their places in these lists
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
    "point": {"opacity": 1},
}  # fmt: skip
EVERY: dict[str, Any] = {"labelExpr": "format(datum.value, ',~r')", "labelOverlap": True}  # ticks of a log axis
PHONE = 320  # pixels that a picture has on any phone
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


def _named(made: Chart, field: str, avoid: Sequence[str] = ()) -> Chart:
    """With names beside the points of the layer `dots`, at any width none on another: where there is no room, no name.

    Vega places such labels, Vega-Lite does not say how, so the mark is added to what it compiles to. Earlier points get
    their names first; none is on a mark of the layers to `avoid`.
    """
    places = ["top-right", "right", "bottom-right", "top-left", "left", "bottom-left", "top", "bottom"]
    room = "[max(9, width), max(9, height)]"  # on the way to a new width it may be 0 for a moment
    mark = {
        "type": "text", "name": "names", "from": {"data": "dots_marks"}, "interactive": False,
        "encode": {"enter": {"text": {"field": f"datum.{field}"}, "fill": {"value": INK}, "fontSize": {"value": 11},
                             "font": {"value": CONFIG["font"]}}},
        "transform": [
            {"type": "label", "size": {"signal": room}, "anchor": places, "offset": [3] * len(places),
             "avoidMarks": [f"{layer}_marks" for layer in avoid]}
        ],
    }  # fmt: skip
    patch = [{"op": "add", "path": "/marks/-", "value": mark}]
    return replace(made, spec={**made.spec, "usermeta": {"embedOptions": {"patch": patch}}})


def _wide(made: Chart, names: Sequence[str]) -> Chart:
    """No narrower than what names at its left leave room for a picture beside."""
    least = 7 * max(map(len, names), default=0) + 150
    return replace(made, least=least) if least > PHONE else made


def _first(rows: Sequence[object], of: int | None) -> str:
    """How many of them are shown, where not all are."""
    return "" if of is None or of <= len(rows) else f", the first {len(rows)} of {of:,}"


def layers(name: str, part: str, rows: Rows) -> Chart:
    """What every block keeps of one part, such as its attention."""
    import altair as alt

    color = MANY[PARTS.get(part, len(MANY) - 1)]
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("block:O", title="block", sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
    )
    whole = base.mark_bar(fill=None, stroke=GREY, strokeOpacity=0.7).encode(
        y=alt.Y("whole:Q", title="kept", axis=alt.Axis(format="%", tickCount=4), scale=alt.Scale(domain=[0, 1]))
    ).transform_calculate(whole="1")  # fmt: skip
    kept = base.mark_bar(color=color).encode(
        y="share:Q", tooltip=["block:O", "sites:N", alt.Tooltip("share:Q", format=".1%"),
                              alt.Tooltip("error:Q", title="relative error", format=".4f")],
    )  # fmt: skip
    mean = sum(row["share"] for row in rows) / max(1, len(rows))
    words = part[:1].upper() + part[1:]
    return _made(
        name, f"{words}: what every block keeps, {mean:.0%} on average; the outline is the dense model",
        f"Bars of the share of {part} kept in each of {len(rows)} blocks; {mean:.0%} on average. The table of sites "
        "has the numbers.",
        alt.layer(whole, kept), 150,
    )  # fmt: skip


def errors(name: str, rows: Rows) -> Chart:
    """Error against what is kept, a line per site."""
    import altair as alt

    parts = list(dict.fromkeys(str(row["kind"]) for row in rows))
    places = [PARTS.get(part, len(MANY) - 1) for part in parts]
    legend = alt.Legend(symbolStrokeWidth=2, symbolSize=400)
    chart = alt.Chart(alt.Data(values=list(rows))).mark_line(opacity=0.8, strokeWidth=1.3).encode(
        x=alt.X("share:Q", title="kept of the dense site", axis=alt.Axis(format="%", tickCount=6),
                scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("error:Q", title="relative error", scale=alt.Scale(type="sqrt")),
        color=alt.Color(
            "kind:N", title=None, scale=alt.Scale(domain=parts, range=[MANY[i] for i in places]), legend=legend
        ),
        strokeDash=alt.StrokeDash(
            "kind:N", title=None, scale=alt.Scale(domain=parts, range=[DASHES[i] for i in places]), legend=legend
        ),
        detail="site:N", tooltip=["site:N", alt.Tooltip("share:Q", format=".0%"), "error:Q"],
    )  # fmt: skip
    return _made(
        name, "Error of every site against what it keeps",
        f"Lines that fall from few kept groups to many, for {len({row['site'] for row in rows})} sites.", chart,
    )  # fmt: skip


def search(name: str, rows: Rows) -> Chart:
    """The losses of all questions, and the lowest so far."""
    import altair as alt

    data = alt.Data(values=list(rows))
    x = alt.X("tokens:Q", title="token-forwards", axis=alt.Axis(format="~s"))
    on = list(dict.fromkeys(row["on"] for row in sorted(rows, key=lambda row: -row["each"])))[:6]  # most tokens first
    colors = [BLUE, GREY, GREEN, PURPLE, *MANY[4:6]][: len(on)]  # orange is the line
    dots = alt.Chart(data).mark_point(filled=True, opacity=0.75, size=28).encode(
        x=x, y=alt.Y("loss:Q", title="objective", scale=alt.Scale(zero=False)),
        color=alt.Color("on:N", title="judged on", scale=alt.Scale(domain=on, range=colors)),
        shape=alt.Shape("on:N", title="judged on", scale=alt.Scale(domain=on, range=SHAPES[: len(on)])),
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


def tried(name: str, rows: Rows, steps: int) -> Chart:
    """A heat map of what the best allocation so far keeps of every site.

    Args:
        name: of the chart.
        rows: of every step and site `step` from 1, `site`, `share`, `tokens` and `loss`; sites in their order.
        steps: how many there are, of which these may be a part.
    """
    import altair as alt

    sites = list(dict.fromkeys(str(row["site"]) for row in rows))
    chart = alt.Chart(alt.Data(values=list(rows))).mark_rect().encode(
        x=alt.X("step:O", title="step",
                axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("site:N", title=None, scale=alt.Scale(domain=sites), axis=alt.Axis(labelOverlap=True)),
        color=alt.Color("share:Q", title="kept", scale=alt.Scale(scheme="viridis", domain=[0, 1]),
                        legend=alt.Legend(format="%", gradientLength=160)),
        tooltip=["site:N", alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("tokens:Q", format=","), "loss:Q"],
    )  # fmt: skip
    moved = [
        (abs(last["share"] - first["share"]), last["site"], first["share"], last["share"])
        for first, last in zip(rows[: len(sites)], rows[-len(sites) :], strict=True)
    ]
    _, most, before, after = max(moved)
    shown = len(rows) // len(sites)
    made = _made(
        name, "What the best allocation so far keeps of every block's parts: the brighter, the more. Every step has a "
        "loss below all before in its pass"
        + (f"; {shown} of {steps} steps" if shown < steps else ""),
        f"Heat map of {len(sites)} sites by {shown} steps. {most} changes most, from {before:.0%} to {after:.0%}.",
        chart, min(900, max(160, 14 * len(sites))),
    )  # fmt: skip
    return _wide(made, sites)


def front(
    name: str, rows: Rows, size: str, loss: str = "perplexity", title: str = "", share: bool = False,
    beaten: str = "beaten in both", log: bool = False,
) -> Chart:  # fmt: skip
    """Two things of which both are better when lower, such as size and perplexity.

    Args:
        name: of the chart.
        rows: of every point its `name`, both things, and whether it is on the `front`; where it was measured with
            noise, `low` and `high` of the one as well, and what can be `said` of it.
        size: key of the one.
        loss: of the other.
        title: what the one is, if its key does not say it.
        share: whether it is a share of the dense model's.
        beaten: what is said of a point that is not on the front.
        log: whether the axis of the other is logarithmic.
    """
    import altair as alt

    title = title or size
    known = [row for row in rows if row[loss] is not None]
    data = alt.Data(values=sorted(known, key=lambda row: not row["front"]))  # the front is named first
    x = alt.X(
        f"{size}:Q",
        title=title,
        scale=alt.Scale(zero=False, padding=16),
        axis=alt.Axis(format="%" if share else "~s", tickCount=6),
    )
    wide = alt.Y(f"{loss}:Q", scale=alt.Scale(type="log", nice=False, padding=16), axis=alt.Axis(**EVERY))
    y = wide if log else alt.Y(f"{loss}:Q", scale=alt.Scale(zero=False, padding=16))
    line = alt.Chart(data).mark_line(color=GREY).encode(x=x, y=y).transform_filter("datum.front")
    measured = [row for row in known if "low" in row and (row["front"] or len(known) <= SHOWN)]
    noise = (
        alt.Chart(alt.Data(values=measured), name="noise")
        .mark_rule(color=GREY, opacity=0.8)
        .encode(x="low:Q", x2="high:Q", y=y)
    )
    words = {True: "on the front", False: beaten}
    said = alt.Scale(domain=list(words.values()), range=[BLUE, GREY])
    shapes = alt.Scale(domain=list(words.values()), range=["circle", "square"])
    dots = alt.Chart(data, name="dots").mark_point(filled=True, size=80).encode(
        x=x, y=y, tooltip=["name:N", f"{size}:Q", f"{loss}:Q", *(["said:N"] if measured else [])],
        color=alt.Color("on:N", title=None, scale=said), shape=alt.Shape("on:N", title=None, scale=shapes),
    ).transform_calculate(on=f"datum.front ? '{words[True]}' : '{words[False]}'")  # fmt: skip
    described = rows if len(rows) <= SHOWN else [row for row in rows if row["front"]]
    which = "Points" if len(described) == len(rows) else f"{len(rows)} points; on the front"
    told = "; ".join(f"{row['name']}: {row[size]:.1%}{_words_of(row)}, {row[loss]}" if share else
                     f"{row['name']}: {row[size]:,}, {row[loss]}" for row in described)  # fmt: skip
    caption = f"{title[:1].upper()}{title[1:]} against {loss}"
    made = _made(name, caption, f"{which}: {told}.", line + noise + dots if measured else line + dots)
    return _named(made, "name", ["noise"] if measured else [])


def _words_of(row: Mapping[str, Any]) -> str:
    return f" ({row['said']})" if "said" in row else ""


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


def intervals(name: str, rows: Rows, to: str, of: int | None = None) -> Chart:
    """Differences with their intervals, the best first.

    Args:
        name: of the chart.
        rows: of every cell.
        to: what they are differences from.
        of: how many cells there are, where these are the first of them.
    """
    import altair as alt

    data = alt.Data(values=[row for row in rows if row["low"] is not None])
    order = [row["cell"] for row in rows]
    y = alt.Y("cell:N", title=None, sort=None, scale=alt.Scale(domain=order))
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color=INK, strokeDash=[3, 3]).encode(x="x:Q")
    words = ["not separated from the best", "worse than the best"]
    legend = alt.Legend(columns=1)  # beside each other they are wider than a phone
    color = alt.Color("tied:N", title=None, scale=alt.Scale(domain=words, range=[BLUE, ORANGE]), legend=legend)
    shape = alt.Shape("tied:N", title=None, scale=alt.Scale(domain=words, range=["circle", "square"]), legend=legend)
    bars = alt.Chart(data).mark_rule(strokeWidth=2).encode(
        y=y, x=alt.X("low:Q", title="log ratio", axis=alt.Axis(tickCount=6, labelOverlap=True)), x2="high:Q",
        color=color,
    )  # fmt: skip
    dots = alt.Chart(data).mark_point(filled=True, size=60).encode(
        y=y, x="mean:Q", color=color, shape=shape,
        tooltip=["cell:N", alt.Tooltip("mean:Q", format="+.4f"), alt.Tooltip("low:Q", format="+.4f"),
                 alt.Tooltip("high:Q", format="+.4f")],
    )  # fmt: skip
    made = _made(
        name, f"Log ratio of perplexity to {to}, with 95 % intervals{_first(rows, of)}; left is better",
        "The numbers are in the columns of the leaderboard.",
        zero + bars + dots, _tall(rows),
    )  # fmt: skip
    return _wide(made, order)


def tradeoff(name: str, rows: Rows) -> Chart:
    """Seconds against perplexity; points with a `label` have it beside them where there is room."""
    import altair as alt

    data = alt.Data(values=sorted(rows, key=lambda row: not row["label"]))
    x = alt.X(
        "seconds:Q", title="seconds", scale=alt.Scale(type="log", nice=False, padding=24),
        axis=alt.Axis(**EVERY),
    )  # fmt: skip
    y = alt.Y("perplexity:Q", scale=alt.Scale(type="log", nice=False, padding=24), axis=alt.Axis(**EVERY))
    dots = alt.Chart(data, name="dots").mark_point(filled=True, size=60, color=BLUE).encode(
        x=x, y=y, tooltip=["cell:N", "seed:O", alt.Tooltip("seconds:Q", format=",.1f"), "perplexity:Q", "tokens:Q"],
    )  # fmt: skip
    made = _made(
        name, "Perplexity against seconds, both on logarithmic axes; names where there is room",
        "The numbers are in the columns of the leaderboard.", alt.layer(dots), 320,
    )  # fmt: skip
    return _named(made, "label")


def sizes(name: str, rows: Rows, what: str, of: int | None = None) -> Chart:
    """A line for every cell over what is kept, and the dense model.

    Args:
        name: of the chart.
        rows: of every cell and size `cell`, `kept` as a share and `perplexity`; the dense model's begins every line,
            and is there once more without a `cell`.
        what: is kept a share of.
        of: how many cells there are, where these are some of them.
    """
    import altair as alt

    cells = list(dict.fromkeys(str(row["cell"]) for row in rows if row["cell"]))
    legend = alt.Legend(columns=1, symbolSize=160) if len(cells) > 3 else alt.Legend(symbolSize=160)
    x = alt.X("kept:Q", title=f"kept, of {what}", axis=alt.Axis(format="%", tickCount=6),
              scale=alt.Scale(zero=False, padding=16))  # fmt: skip
    y = alt.Y("perplexity:Q", scale=alt.Scale(type="log", nice=False, padding=16), axis=alt.Axis(**EVERY))

    def by(channel: Any, of_cells: Sequence[Any]) -> Any:
        return channel("cell:N", title=None, scale=alt.Scale(domain=cells, range=of_cells[: len(cells)]), legend=legend)

    data = alt.Data(values=[row for row in rows if row["cell"]])
    base = alt.Chart(data).encode(
        x=x, y=y, color=by(alt.Color, MANY),
        tooltip=["cell:N", alt.Tooltip("kept:Q", format=".2%"), alt.Tooltip("perplexity:Q", format=",.2f")],
    )  # fmt: skip
    lines = base.mark_line().encode(strokeDash=by(alt.StrokeDash, DASHES))
    dots = base.mark_point(filled=True, size=60).encode(shape=by(alt.Shape, SHAPES))
    dense = alt.Chart(alt.Data(values=[row for row in rows if not row["cell"]])).encode(x=x, y=y)
    whole = dense.mark_point(shape="diamond", size=90, color=INK) + dense.mark_text(dy=-14, text="dense", color=INK)
    said = "; ".join(f"{row['cell'] or 'dense'} at {row['kept']:.0%}: {row['perplexity']:,.2f}" for row in rows)
    caption = "Perplexity against size" + ("" if of is None or of <= len(cells) else f", {len(cells)} of {of} cells")
    return _made(name, caption, f"Lines over what is kept of {what}: {said}.", lines + dots + whole, 320)


def stages(name: str, rows: Rows, steps: Sequence[str], of: int | None = None) -> Chart:
    """Seconds of every cell by stage, one behind another; `steps`: all stages of the page, each of its colour."""
    import altair as alt

    cells = list(dict.fromkeys(str(row["cell"]) for row in rows))
    y = alt.Y("cell:N", title=None, scale=alt.Scale(domain=cells))
    bars = alt.Chart(alt.Data(values=list(rows))).mark_bar(stroke="var(--paper)").encode(
        y=y, x=alt.X("seconds:Q", title="seconds", axis=alt.Axis(tickCount=6, labelOverlap=True)),
        color=alt.Color("stage:N", title=None, sort=None, scale=alt.Scale(domain=steps, range=MANY)),
        order=alt.Order("place:Q"), tooltip=["cell:N", "stage:N", alt.Tooltip("seconds:Q", format=",.1f")],
    )  # fmt: skip
    made = _made(
        name, f"Seconds by stage{_first(cells, of)}; the table below has the numbers",
        f"Bars of {len(cells)} cells, of {', '.join(steps)}. The table has the numbers.", bars, _tall(cells),
    )  # fmt: skip
    return _wide(made, cells)


def anytime(name: str, rows: Rows, of: int | None = None) -> Chart:
    """The lowest loss so far against token-forwards; `of`: how many cells search, where these are the first of them."""
    import altair as alt

    cells = list(dict.fromkeys(str(row["cell"]) for row in rows))
    legend = alt.Legend(columns=1, symbolSize=400) if len(cells) > 3 else alt.Legend(symbolSize=400)
    dashes = alt.Scale(domain=cells, range=DASHES[: len(cells)])
    chart = alt.Chart(alt.Data(values=list(rows))).mark_line(interpolate="step-after", point=True).encode(
        x=alt.X("tokens:Q", title="token-forwards", axis=alt.Axis(format="~s", labelOverlap=True, tickCount=6),
                scale=alt.Scale(type="log", nice=False, padding=16)),
        y=alt.Y("loss:Q", title="lowest objective so far", scale=alt.Scale(zero=False)),
        color=alt.Color("cell:N", title=None, scale=alt.Scale(domain=cells, range=MANY), legend=legend),
        strokeDash=alt.StrokeDash("cell:N", title=None, scale=dashes, legend=legend),
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
        .encode(y=y, x=alt.X("rank:Q", title="mean rank", axis=alt.Axis(tickCount=8)), x2="to:Q")
    )
    dots = (
        alt.Chart(data)
        .mark_point(filled=True, size=60, color=BLUE)
        .encode(y=y, x="rank:Q", tooltip=["cell:N", "rank:Q"])
    )
    said = ", ".join(f"{row['cell']} {row['rank']:.2f}" for row in rows)
    made = _made(
        name,
        f"Mean ranks{_first(rows, len(order))}; ranks within a bar are not separated from its left end",
        f"{said}.",
        bars + dots,
        _tall(rows),
    )
    return _wide(made, [str(row["cell"]) for row in rows])
