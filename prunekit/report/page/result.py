"""The sections about a result: the model before and after, every site, the search, cost, samples, the recipe."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from prunekit.report.ledger import read_records
from prunekit.report.markup import folded, paragraph, table
from prunekit.report.page import charts
from prunekit.report.page.part import Part
from prunekit.report.page.sizes import milliseconds
from prunekit.report.picture import part_of, removed_shares
from prunekit.report.words import finite, number
from prunekit.system.files import read_json

STEPS, TILES = 40, 6_000  # of a heat map of allocations: columns, and tiles, at most


def parts_of_result(folder: Path, name: str) -> list[Part]:
    report = read_json(folder / "report.json")
    ledger = read_records(folder / "ledger.jsonl")
    model, pruned = Path(str(report["model"])).name, report["pruned"]
    title = f"{model}, {pruned['sparsity_of_blocks']:.0%} of the blocks removed"
    sites = report["sites"]
    narrow = report.get("width", {"channels": 1, "of": 1})
    layers = [
        charts.layers(f"{name}-layers-{i}", part, rows)
        for i, (part, rows) in enumerate(_blocks(sites, narrow["channels"] / narrow["of"]).items())
    ]
    parts = [
        Part(title, title, name, facts(report), layers),
    ]
    curves = _error_curves(ledger, {site["name"]: site for site in sites})
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
        drawn = [charts.search(f"{name}-asked", asked)]
        best = _best_so_far(ledger, [site["name"] for site in sites])
        if len(best) > 1:
            drawn.append(charts.tried(f"{name}-tried", _steps(best, sites), len(best)))
        parts.append(Part(title, "Search", f"{name}-search", _search_text(report), drawn))
    parts.append(Part(title, "Cost", f"{name}-cost", "", [charts.cost(f"{name}-seconds", _stages(report["seconds"]))]))
    if samples := report.get("samples"):
        parts.append(Part(title, "What both models write", f"{name}-text", _samples(samples)))
    parts.append(Part(title, "Recipe and environment", f"{name}-recipe", _recipe(folder, report)))
    return parts


def facts(report: Mapping[str, Any]) -> str:
    """Make the table of before and after; `report` is the content of report.json."""
    losses, dense, pruned = report["losses"], report["dense"], report["pruned"]
    before, after = losses["dense"], losses["pruned"]
    nats = [each["nll"] for each in (before, after)]
    rise = f"{nats[1] - nats[0]:+.4f}" if all(finite(each) is not None for each in nats) else ""
    rows = [
        _counted("Parameters", dense["parameters"], pruned["parameters"]),
        _counted("of them in blocks", dense["block_parameters"], pruned["block_parameters"]),
        ("Perplexity", number(before["perplexity"]), number(after["perplexity"]),
         _ratio(before["perplexity"], after["perplexity"])),
        ("Nats per token", number(nats[0], 4), number(nats[1], 4), rise),
    ]  # fmt: skip
    if (found := report.get("weights")) is not None:
        rows.append(_counted("Not zero in linear maps", found["in_linear_maps"], found["not_zero"]))
    if (narrow := report.get("width")) is not None:
        rows.append(_counted("Residual width", narrow["of"], narrow["channels"]))
        if narrow.get("shares"):
            tried = ", ".join(f"{each['share']:g}" for each in narrow["shares"])
            rows.append(("Share of the width", "", f"{narrow['share']:g} of {tried}", ""))
    if (layers := report.get("experts")) is not None:
        rows.append(_counted("Experts", *(sum(each[key] for each in layers) for key in ("of", "kept"))))
    if "unfinished" in losses:
        unfinished = losses["unfinished"]["perplexity"]
        rows.append(("Perplexity before recovery", "", number(unfinished), _ratio(before["perplexity"], unfinished)))
    if (times := milliseconds(report)) is not None:
        rows.append(("Milliseconds", number(times[0]), number(times[1]), _ratio(*times)))
    text = f"Perplexity is of {before['label']}."
    return table("Before and after", ("", "dense", "pruned", "against dense"), rows) + paragraph(text)


def _counted(what: str, dense: int, pruned: int) -> tuple[str, str, str, str]:
    return what, f"{dense:,}", f"{pruned:,}", _ratio(dense, pruned)


def _ratio(dense: float | None, pruned: float | None) -> str:
    """The one over the other, in percent; nothing where there is none."""
    before, after = finite(dense), finite(pruned)
    return f"{after / before:.1%}" if before and after is not None else ""


def _blocks(sites: Sequence[Mapping[str, Any]], width: float) -> dict[str, list[dict[str, Any]]]:
    """By part of a block, what every block keeps of it; a part may have several sites."""
    of = defaultdict[tuple[str, int], list[Mapping[str, Any]]](list)
    for site in sites:
        of[part_of(site), site["block"]].append(site)

    def row(part: str, block: int, removed: float) -> dict[str, Any]:
        here = of[part, block]
        errors = [error for site in here if (error := finite(site["error"])) is not None]
        return {
            "block": block, "share": max(0.0, 1 - removed),
            "sites": ", ".join(f"{site['kept']:,} of {site['groups']:,}" for site in here),
            "error": sum(errors) / len(errors) if errors else None,
        }  # fmt: skip

    found = removed_shares([site for site in sites if site["groups"]], width)
    return {part: [row(part, block, gone) for block, gone in shares.items()] for part, shares in found.items()}


def _error_curves(ledger: Sequence[Mapping[str, Any]], sites: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The error of every rung of every site in the last pass that had several.

    Ladders of later passes are of a part of a site's counts: shares are of all its groups, as `sites` of the report
    have them by name.
    """
    spaces = [r for r in ledger if r.get("kind") == "space" and any(len(ladder) > 1 for ladder in r["ladders"])]
    if not spaces:
        return []
    space, rows = spaces[-1], list[dict[str, Any]]()
    for site, ladder, errors in zip(space["sites"], space["ladders"], space["errors"], strict=True):
        if site not in sites:
            continue
        some = max(1, len(ladder) // 24)  # a curve needs no more points
        for i, (kept, error) in enumerate(zip(ladder, errors, strict=True)):
            if error is not None and math.isfinite(error) and (i % some == 0 or i == len(ladder) - 1):
                share = kept / (sites[site]["groups"] or 1)
                rows.append({"site": site, "kind": part_of(sites[site]), "share": share, "error": error})
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
            "tokens": tokens, "loss": loss, "each": record["tokens"], "on": f"{record['tokens']:,} tokens",
            "lowest": lowest if math.isfinite(lowest) else None,
        })  # fmt: skip
    return rows


def _best_so_far(ledger: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The questions about these sites, on the most tokens, that had a lower loss than all before in their pass.

    Every pass makes candidates anew, so that its losses are not those of the pass before; the last step is the answer.
    """
    most = max((r["tokens"] for r in ledger if r.get("kind") == "question"), default=0)
    found, here, spent, lowest = list[dict[str, Any]](), names, 0, math.inf
    for record in ledger:
        if record.get("kind") == "space":
            here, lowest = record["sites"], math.inf  # an earlier pass may be about others: experts before neurons
        if record.get("kind") != "question":
            continue
        spent += 0 if "shared" in record else record["tokens"] + record.get("training", 0)
        loss = record["loss"]
        if record["tokens"] == most and loss is not None and loss < lowest and here == names:
            lowest = loss
            found.append({"allocation": record["allocation"], "tokens": spent, "loss": loss})
    return found


def _steps(best: Sequence[Mapping[str, Any]], sites: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tiles of some steps, spread over all, the first and the last among them; of many sites fewer steps."""
    shown = min(len(best), max(2, min(STEPS, TILES // max(1, len(sites)))))
    places = sorted({round(i * (len(best) - 1) / (shown - 1)) for i in range(shown)})
    short = [f"{site['block']} {part_of(site)}" for site in sites]  # there is little room beside a picture on a phone
    names = short if len(set(short)) == len(short) else [site["name"] for site in sites]
    return [
        {"step": place + 1, "site": name, "share": kept / (site["groups"] or 1),
         "tokens": best[place]["tokens"], "loss": best[place]["loss"]}
        for place in places
        for name, site, kept in zip(names, sites, best[place]["allocation"], strict=True)
    ]  # fmt: skip


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
    texts = table("Text", ("part", "source", "tokens", "window", "sha256"), data, text=True)
    limits = (
        "Perplexity is one text's, and says little of what a model can do; relative errors are of layers on the "
        "calibration text. Speed is not measured here unless a row says so."
    )
    return f"{texts}{versions}<pre tabindex='0' aria-label='recipe'>{html.escape(text)}</pre>{paragraph(limits)}"


def _stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"stage": stage, "seconds": float(spent)} for stage, spent in seconds.items() if spent]
