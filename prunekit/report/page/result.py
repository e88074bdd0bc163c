"""The sections about a result: the model before and after, every site, the search, cost, samples, the recipe."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence, Set
from itertools import accumulate
from pathlib import Path
from typing import Any

from prunekit.report.ledger import read_records
from prunekit.report.markup import folded, paragraph, table
from prunekit.report.page import charts
from prunekit.report.page.part import Part
from prunekit.report.words import finite, number
from prunekit.system.files import read_json


def parts_of_result(folder: Path, name: str) -> list[Part]:
    report = read_json(folder / "report.json")
    ledger = read_records(folder / "ledger.jsonl")
    model, pruned = Path(str(report["model"])).name, report["pruned"]
    title = f"{model}, {pruned['sparsity_of_blocks']:.0%} of the blocks removed"
    sites = report["sites"]
    blocks = [
        {"block": site["block"], "kind": site["kind"], "kept": site["kept"], "groups": site["groups"],
         "share": site["kept"] / site["groups"] if site["groups"] else 0.0, "error": finite(site["error"])}
        for site in sites
    ]  # fmt: skip
    layers = [charts.layers(f"{name}-layers", blocks)]
    parts = [
        Part(title, title, name, facts(report), layers),
    ]
    curves = _error_curves(ledger, {site["name"] for site in sites if site["kind"] == "mixer"})
    errors = [charts.errors(f"{name}-errors", curves)] if curves else []
    kept = table(
        "Every site",
        ("site", "block", "kind", "kept", "of", "relative error"),
        [
            (site["name"], site["block"], site["kind"], site["kept"], site["groups"], number(site["error"], 4))
            for site in sites
        ],
        sortable=True,
    )
    parts.append(Part(title, "Sites", f"{name}-sites", "", errors, folded("All sites as a table", kept)))
    if asked := _questions(ledger):
        parts.append(
            Part(title, "Search", f"{name}-search", _search_text(report), [charts.search(f"{name}-asked", asked)])
        )
    parts.append(Part(title, "Cost", f"{name}-cost", "", [charts.cost(f"{name}-seconds", _stages(report["seconds"]))]))
    if samples := report.get("samples"):
        parts.append(Part(title, "What both models write", f"{name}-text", _samples(samples)))
    parts.append(Part(title, "Recipe and environment", f"{name}-recipe", _recipe(folder, report)))
    return parts


def facts(report: Mapping[str, Any]) -> str:
    """Make the table of before and after; `report` is the content of report.json."""
    losses, dense, pruned = report["losses"], report["dense"], report["pruned"]
    rows = [
        ("Parameters", f"{dense['parameters']:,}", f"{pruned['parameters']:,}"),
        ("of them in blocks", f"{dense['block_parameters']:,}", f"{pruned['block_parameters']:,}"),
        ("Perplexity", number(losses["dense"]["perplexity"]), number(losses["pruned"]["perplexity"])),
        ("Nats per token", number(losses["dense"]["nll"], 4), number(losses["pruned"]["nll"], 4)),
    ]
    if (narrow := report.get("width")) is not None:
        rows.append(("Residual width", f"{narrow['of']:,}", f"{narrow['channels']:,}"))
        if narrow.get("shares"):
            tried = ", ".join(f"{each['share']:g}" for each in narrow["shares"])
            rows.append(("Share of the width", "", f"{narrow['share']:g} of {tried}"))
    if (layers := report.get("experts")) is not None:
        before, after = (sum(each[key] for each in layers) for key in ("of", "kept"))
        rows.append(("Experts", f"{before:,}", f"{after:,}"))
    if "unfinished" in losses:
        rows.append(("Perplexity before recovery", "", number(losses["unfinished"]["perplexity"])))
    pace = report.get("latency")
    if pace is not None and "dense" in pace and "pruned" in pace:
        rows.append(("Milliseconds", number(pace["dense"]), number(pace["pruned"])))
    text = f"Perplexity is of {losses['dense']['label']}."
    return table("Before and after", ("", "dense", "pruned"), rows) + paragraph(text)


def _error_curves(ledger: Sequence[Mapping[str, Any]], mixers: Set[str]) -> list[dict[str, Any]]:
    """The error of every rung of every site in the last pass that had several."""
    spaces = [r for r in ledger if r.get("kind") == "space" and any(len(ladder) > 1 for ladder in r["ladders"])]
    if not spaces:
        return []
    space, rows = spaces[-1], list[dict[str, Any]]()
    for site, ladder, errors in zip(space["sites"], space["ladders"], space["errors"], strict=True):
        most, some = max(ladder) or 1, max(1, len(ladder) // 24)  # a curve needs no more points
        for i, (kept, error) in enumerate(zip(ladder, errors, strict=True)):
            if error is not None and math.isfinite(error) and (i % some == 0 or i == len(ladder) - 1):
                attends = "attn" in site or "attention" in site
                kind = "mixer" if site in mixers else "attention" if attends else "mlp"
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
    return paragraph(
        f"{search['questions']:,} allocations were judged, on {search['token_forwards']:,} token-forwards."
        + (f" The limit ended it early: {search['limited']}." if search.get("limited") else "")
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in samples:
        rows.append((str(one["prompt"]), str(_of(one["dense"])), str(_of(one["pruned"]))))
    return table("The same prompts, continued greedily", ("prompt", "dense", "pruned"), rows, text=True)


def _of(written: Any) -> Any:
    return written.get("text", "") if isinstance(written, Mapping) else written


def _recipe(folder: Path, report: Mapping[str, Any]) -> str:
    file = folder / "recipe.yaml"
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    versions = table("Versions", ("package", "version"), list(report["versions"].items()))
    data = [
        (part, found["source"], f"{found['tokens']:,}", found["seqlen"], str(found["sha256"])[:12])
        for part, found in report["data"].items()
        if isinstance(found, Mapping)
    ]
    texts = table("Text", ("part", "source", "tokens", "window", "sha256"), data)
    limits = (
        "Perplexity is one text's, and says little of what a model can do; relative errors are of layers on the "
        "calibration text. Speed is not measured here unless a row says so."
    )
    return f"{texts}{versions}<pre tabindex='0' aria-label='recipe'>{html.escape(text)}</pre>{paragraph(limits)}"


def _stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"stage": stage, "seconds": float(spent)} for stage, spent in seconds.items() if spent]
