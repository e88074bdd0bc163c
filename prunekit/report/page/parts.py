"""What a page says of a folder: a result, a family or a comparison, as sections of HTML and charts."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput
from prunekit.recipe.suite import Suite
from prunekit.report.comparison import COMPLETE, DENSE, REFERENCE, ROWS, Comparison, Rows, number, said
from prunekit.report.page import charts
from prunekit.report.page.charts import Chart
from prunekit.report.statistics import Standing
from prunekit.system.files import Damaged, read_json, read_state
from prunekit.system.progress import span

CARD = "run.json"


@dataclass(frozen=True)
class Part:
    """A section of a page."""

    title: str  # of the page that begins with it
    heading: str
    anchor: str  # that no other section of the page has
    before: str = ""  # HTML in front of the charts
    charts: Sequence[Chart] = field(default=())
    after: str = ""  # HTML behind them


def parts_of(folder: Path, name: str = "run") -> list[Part]:
    """The sections about a folder.

    Args:
        folder: of a result, a family or a comparison.
        name: begins all anchors, which no other folder of the page has.

    Raises:
        WrongInput: it is no result, family or comparison.
    """
    try:
        if (folder / ROWS).is_file():
            return _of_comparison(folder, name)
        if (folder / "pareto.json").is_file():
            return _of_family(folder, name)
        if (folder / "report.json").is_file():
            return _of_result(folder, name)
    except (WrongInput, Damaged):
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise WrongInput(
            f"{folder} holds a report that this version cannot read ({type(error).__name__}: {error}); make it again"
        ) from error
    raise WrongInput(
        f"{folder} is no result, family or comparison; give a folder with report.json, pareto.json or {ROWS}"
    )


# -- a result -----------------------------------------------------------------------------------------


def _of_result(folder: Path, name: str) -> list[Part]:
    report = read_json(folder / "report.json")
    ledger = _ledger(folder / "ledger.jsonl")
    model, losses = Path(str(report["model"])).name, report["losses"]
    dense, pruned = report["dense"], report["pruned"]
    title = f"{model}, {pruned['sparsity_of_blocks']:.0%} of the blocks removed"
    facts = [
        ("Parameters", f"{dense['parameters']:,}", f"{pruned['parameters']:,}"),
        ("of them in blocks", f"{dense['block_parameters']:,}", f"{pruned['block_parameters']:,}"),
        ("Perplexity", _number(losses["dense"]["perplexity"]), _number(losses["pruned"]["perplexity"])),
        ("Nats per token", _number(losses["dense"]["nll"], 4), _number(losses["pruned"]["nll"], 4)),
    ]
    if (narrow := report.get("width")) is not None:
        facts.append(("Residual width", f"{narrow['of']:,}", f"{narrow['channels']:,}"))
    if "unfinished" in losses:
        facts.append(("Perplexity before recovery", "", _number(losses["unfinished"]["perplexity"])))
    pace = report.get("latency")
    if pace is not None and "dense" in pace and "pruned" in pace:
        facts.append(("Milliseconds", _number(pace["dense"]), _number(pace["pruned"])))
    text = f"Perplexity is of {losses['dense']['label']}."
    sites = report["sites"]
    blocks = [
        {"block": site["block"], "kind": site["kind"], "kept": site["kept"], "groups": site["groups"],
         "share": site["kept"] / site["groups"] if site["groups"] else 0.0, "error": _finite(site["error"])}
        for site in sites
    ]  # fmt: skip
    layers = [charts.layers(f"{name}-layers", blocks)]
    parts = [
        Part(title, title, name, _table("Before and after", ("", "dense", "pruned"), facts) + _paragraph(text), layers),
    ]
    curves = _error_curves(ledger)
    errors = [charts.errors(f"{name}-errors", curves)] if curves else []
    kept = _table(
        "Every site",
        ("site", "block", "kind", "kept", "of", "relative error"),
        [
            (site["name"], site["block"], site["kind"], site["kept"], site["groups"], _number(site["error"], 4))
            for site in sites
        ],
        sortable=True,
    )
    parts.append(Part(title, "Sites", f"{name}-sites", "", errors, _folded("All sites as a table", kept)))
    if asked := _questions(ledger):
        parts.append(
            Part(title, "Search", f"{name}-search", _search_text(report), [charts.search(f"{name}-asked", asked)])
        )
    parts.append(Part(title, "Cost", f"{name}-cost", "", [charts.cost(f"{name}-seconds", _stages(report["seconds"]))]))
    if samples := report.get("samples"):
        parts.append(Part(title, "What both models write", f"{name}-text", _samples(samples)))
    parts.append(Part(title, "Recipe and environment", f"{name}-recipe", _recipe(folder, report)))
    return parts


def _ledger(path: Path) -> list[dict[str, Any]]:
    """Records of a ledger; a line that cannot be read ends it."""
    found = list[dict[str, Any]]()
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if isinstance(record, dict):
            found.append(record)
    return found


def _error_curves(ledger: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The error of every rung of every site in the last pass that had several."""
    spaces = [r for r in ledger if r.get("kind") == "space" and any(len(ladder) > 1 for ladder in r["ladders"])]
    if not spaces:
        return []
    space, rows = spaces[-1], list[dict[str, Any]]()
    for site, ladder, errors in zip(space["sites"], space["ladders"], space["errors"], strict=True):
        most, some = max(ladder) or 1, max(1, len(ladder) // 24)  # a curve needs no more points
        for i, (kept, error) in enumerate(zip(ladder, errors, strict=True)):
            if error is not None and math.isfinite(error) and (i % some == 0 or i == len(ladder) - 1):
                kind = "attention" if "attn" in site or "attention" in site else "mlp"
                rows.append({"site": site, "kind": kind, "share": kept / most, "error": error})
    return rows


def _questions(ledger: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    asked = [r for r in ledger if r.get("kind") == "question"]
    most = max((r["tokens"] for r in asked), default=0)
    spent = accumulate(0 if "shared" in r else r["tokens"] + r.get("training", 0) for r in asked)
    rows, lowest = list[dict[str, Any]](), math.inf
    for record, tokens in zip(asked, spent, strict=True):
        loss = record["loss"]
        if loss is None:
            continue
        if record["tokens"] == most:
            lowest = min(lowest, loss)
        rows.append({
            "tokens": tokens, "loss": loss, "on": f"{record['tokens']:,} tokens",
            "lowest": lowest if math.isfinite(lowest) else None,
        })  # fmt: skip
    return rows


def _search_text(report: Mapping[str, Any]) -> str:
    search = report["search"]
    return _paragraph(
        f"{search['questions']:,} allocations were judged, on {search['token_forwards']:,} token-forwards."
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in samples:
        rows.append((str(one["prompt"]), str(_of(one["dense"])), str(_of(one["pruned"]))))
    return _table("The same prompts, continued greedily", ("prompt", "dense", "pruned"), rows, text=True)


def _of(written: Any) -> Any:
    return written.get("text", "") if isinstance(written, Mapping) else written


def _recipe(folder: Path, report: Mapping[str, Any]) -> str:
    file = folder / "recipe.yaml"
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    versions = _table("Versions", ("package", "version"), list(report["versions"].items()))
    data = [
        (part, found["source"], f"{found['tokens']:,}", found["seqlen"], str(found["sha256"])[:12])
        for part, found in report["data"].items()
        if isinstance(found, Mapping)
    ]
    texts = _table("Text", ("part", "source", "tokens", "window", "sha256"), data)
    limits = (
        "Perplexity is one text's, and says little of what a model can do; relative errors are of layers on the "
        "calibration text. Speed is not measured here unless a row says so."
    )
    return f"{texts}{versions}<pre tabindex='0' aria-label='recipe'>{html.escape(text)}</pre>{_paragraph(limits)}"


# -- a family -----------------------------------------------------------------------------------------


def _of_family(folder: Path, name: str) -> list[Part]:
    document = read_json(folder / "pareto.json")
    rows, dense = document["members"], document["dense"]
    model = Path(str(document["model"])).name
    title = f"{model}, a family of {len(rows)}"
    points = [
        {"name": str(row["folder"]), "parameters": row["parameters"], "perplexity": _finite(row["perplexity"]),
         "front": bool(row["front"])}
        for row in rows
    ]  # fmt: skip
    points.append(
        {"name": "dense", "parameters": dense["parameters"], "perplexity": dense["perplexity"], "front": True}
    )
    drawn = [charts.front(f"{name}-front", points, "parameters")]
    table = _table(
        "Members",
        ("folder", "sparsity", "parameters", "perplexity", "on the front"),
        [
            (row["folder"], f"{row['sparsity']:.0%}", f"{row['parameters']:,}", _number(row["perplexity"]),
             "yes" if row["front"] else "no")
            for row in rows
        ],
        sortable=True,
    )  # fmt: skip
    return [Part(title, title, name, table, drawn)]


# -- a comparison -------------------------------------------------------------------------------------


def _of_comparison(folder: Path, name: str) -> list[Part]:
    try:
        suite = Suite.of_mapping(read_state(folder / CARD)["identity"]["suite"])
    except (KeyError, TypeError, Damaged) as error:
        raise WrongInput(f"{folder / CARD} does not say what was compared; run the comparison again") from error
    found = Comparison(suite, list(Rows(folder / ROWS)), folder)
    models = list(dict.fromkeys(model for model, _ in found.places))
    cells = {row.cell for row in found.rows if row.cell != DENSE}
    title = f"{len(cells)} methods on {', '.join(Path(model).name for model in models) or 'no model yet'}"
    parts = list[Part]()
    for i, (model, sparsity) in enumerate(found.places):
        heading = f"{Path(model).name}, {sparsity:.0%} removed"
        standing, rows = found.standings(model, sparsity), found.of(model, sparsity)
        anchor = f"{name}-{i}"
        dense = found.dense(model)
        intro = _paragraph(
            f"Dense: {number(dense.perplexity)} ({dense.label}). Differences are logs of ratios of perplexities, "
            "paired by window, with 95 % intervals over windows and seeds. What is marked = is not separated from the "
            "best after Holm's correction."
        )
        drawn = [
            charts.intervals(f"{anchor}-intervals", [_against(each) for each in standing]),
            charts.tradeoff(f"{anchor}-cost", [
                {"cell": cell, "perplexity": row.perplexity, "seconds": max(row.seconds, 0.01), "seed": row.seed,
                 "tokens": row.token_forwards}
                for cell, some in rows.items() for row in some if row.perplexity is not None
            ]),
        ]  # fmt: skip
        traces = [
            {"cell": cell, "tokens": tokens, "loss": loss}
            for cell, some in rows.items() for tokens, loss in some[0].trace if tokens
        ]  # fmt: skip
        if traces:
            drawn.append(charts.anytime(f"{anchor}-anytime", traces))
        parts.append(Part(title, heading, anchor, intro + _leaderboard(standing, rows), drawn))
    if (ranked := found.ranks()) is not None:
        text = _paragraph(
            f"Friedman's p that all are alike: {ranked.p:.3g}, over {ranked.blocks} blocks of model, sparsity and "
            f"seed. Ranks that differ by less than {ranked.critical:.2f} are not separated (Nemenyi, 95 %)."
        )
        drawn = [charts.ranks(f"{name}-ranks-chart", ranked.mean, ranked.critical)]
        parts.append(Part(title, "Mean ranks", f"{name}-ranks", text, drawn))
    if found.without:
        rows_ = [(r.cell, Path(r.model).name, f"{r.sparsity:.0%}", r.seed, r.state, r.reason) for r in found.without]
        table = _table("Cells without a result", ("cell", "model", "removed", "seed", "state", "reason"), rows_)
        parts.append(Part(title, "Without a result", f"{name}-without", table))
    spent = sum(row.wall for row in found.rows)
    done = sum(row.state == COMPLETE for row in found.rows)
    text = json.dumps(suite.model_dump(mode="json"), indent=2)
    versions = _table("Versions", ("package", "version"), list(found.as_dict()["versions"].items()))
    about = f"{_paragraph(f'{done} rows in {span(spent)}.')}{versions}"
    about += f"<pre tabindex='0' aria-label='suite'>{html.escape(text)}</pre>"
    parts.append(Part(title, "Suite and environment", f"{name}-suite", about))
    return parts


def _against(each: Standing) -> dict[str, Any]:
    """A standing as a point with its interval against the reference, or against the best where there is none."""
    found = each.above_reference or each.above_best
    return {
        "cell": each.name, "mean": _finite(found.mean), "low": _finite(found.low), "high": _finite(found.high),
        "tied": "not separated from the best" if each.tied else "worse than the best",
    }  # fmt: skip


def _leaderboard(standing: Sequence[Standing], rows: Mapping[str, Sequence[Any]]) -> str:
    lines = []
    for place, each in enumerate(standing, start=1):
        some = rows[each.name]
        spread = f" ± {_number((math.exp(each.loss + each.spread) - math.exp(each.loss - each.spread)) / 2)}"
        value = math.exp(each.loss) if math.isfinite(each.loss) and each.loss < 700 else math.inf
        lines.append((
            str(place) if place == 1 or not each.tied else "=",
            each.name,
            _number(value) + (spread if len(some) > 1 and math.isfinite(value) else ""),
            "" if place == 1 else said(each.above_best),
            "" if each.above_reference is None or each.name == REFERENCE else said(each.above_reference),
            f"{min(row.removed for row in some):.2%}",
            f"{sum(row.token_forwards for row in some) // len(some):,}",
            f"{sum(row.seconds for row in some) / len(some):,.1f}",
            len(some),
        ))  # fmt: skip
    heads = ("", "cell", "perplexity", "to the best", "to uniform", "removed", "token-forwards", "seconds", "seeds")
    return _table("Leaderboard", heads, lines, sortable=True, filtered=True)


# -- HTML ---------------------------------------------------------------------------------------------


def _table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], *, sortable: bool = False,
    filtered: bool = False, text: bool = False,
) -> str:  # fmt: skip
    """A table with a caption; its first cell in a row is a heading where it says something."""
    kind = " ".join(word for word, wanted in (("sortable", sortable), ("filtered", filtered), ("text", text)) if wanted)
    head = "".join(f'<th scope="col">{html.escape(each) or "<span class=hidden>place</span>"}</th>' for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{html.escape(caption)}"><table class="{kind}">'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"stage": stage, "seconds": float(spent)} for stage, spent in seconds.items() if spent]


def _number(value: Any, digits: int = 2) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else "inf"


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
