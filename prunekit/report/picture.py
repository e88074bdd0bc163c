"""Sparsity per block as an SVG picture, attention, other mixers and MLP side by side."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

LEFT, BAR, GAP = 44, 280, 76  # pixels: block numbers, the longest bar, room for its number
TOP = 64
COLOURS = ("#3b82f6", "#d97706", "#059669")
MIXERS = ("conv", "linear_attn")  # what stands in the place of attention, where a family has other mixers too
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#6e7781}.head{font-size:14px;font-weight:600}.side{text-anchor:end}"
    ".all{fill:#8b949e;fill-opacity:.18}"
    "@media(prefers-color-scheme:dark){text{fill:#c9d1d9}}"
)


def removed_shares(sites: Sequence[Mapping[str, Any]], width: float = 1.0) -> dict[str, dict[int, float]]:
    """Compute the share that is removed, of groups or weights.

    Args:
        sites: of a report.
        width: the share of the residual stream's channels that is kept; what is left of every group has so much.

    Returns:
        Part of a block -> block -> share, 0 to 1.
    """
    sizes: dict[str, float] = {}  # parameters per kept unit, of sites that differ in their block alone
    for site in sites:
        if site["kept"]:
            sizes[_alike(site)] = site["parameters"] / site["kept"]
    dense, kept = defaultdict[tuple[str, int], float](float), defaultdict[tuple[str, int], float](float)
    for site in sites:
        key, size = (part_of(site), site["block"]), sizes.get(_alike(site), 1.0)
        dense[key] += size * site["groups"]
        kept[key] += size * site["kept"]
    parts = dict.fromkeys(part for part, _ in dense)
    return {
        each: {b: 1 - width * kept[each, b] / dense[each, b] for part, b in dense if part == each} for each in parts
    }


def draw(sites: Sequence[Mapping[str, Any]], width: float = 1.0) -> str:
    """Draw one row per block with one bar per part, as long as the share that is removed, as of `removed_shares`."""
    parts = removed_shares(sites, width)
    blocks = range(max(site["block"] for site in sites) + 1)
    row = 18 if len(blocks) <= 40 else 14
    width, height = LEFT + len(parts) * (BAR + GAP), TOP + len(blocks) * row + 12
    told = "; ".join(f"{part} {fmean(shares.values()):.1%}" for part, shares in parts.items())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'role="img" aria-labelledby="title desc">',
        '<title id="title">Sparsity per block</title>',
        f'<desc id="desc">{escape(f"Share removed of every block, in percent. Mean over blocks: {told}.")}</desc>',
        f"<style>{STYLE}</style>",
        f'<text x="{LEFT - 8}" y="{TOP - 12}" class="side">block</text>',
    ]
    lines += [_text(LEFT - 8, TOP + block * row + row - 5, str(block), "side") for block in blocks]
    for column, (part, shares) in enumerate(parts.items()):
        left, colour = LEFT + column * (BAR + GAP), COLOURS[column % len(COLOURS)]
        lines.append(_text(left, 22, f"{part}, % removed", "head"))
        lines += [
            _text(left + BAR * mark // 100, TOP - 12, str(mark), "", anchor) for mark, anchor in
            ((0, "start"), (50, "middle"), (100, "end"))
        ]  # fmt: skip
        for block, share in shares.items():
            y = TOP + block * row
            lines.append(f'<rect x="{left}" y="{y + 1}" width="{BAR}" height="{row - 4}" class="all"/>')
            lines.append(f'<rect x="{left}" y="{y + 1}" width="{BAR * share:.1f}" height="{row - 4}" fill="{colour}"/>')
            lines.append(_text(left + BAR + 6, y + row - 5, f"{100 * share:.1f}"))
    return "\n".join([*lines, "</svg>", ""])


def part_of(site: Mapping[str, Any]) -> str:
    """The sub-layer that a site is in, from its kind, or its place in the block."""
    inside = re.sub(r"^.*?\.\d+\.", "", site["name"]).split(".")[0]
    if site["kind"] == "mixer" or inside in MIXERS:
        return "mixer"
    if site["kind"] == "attention" or "att" in inside:
        return "attention"
    if site["kind"] == "experts":
        return "experts"
    return "MLP" if site["kind"] == "mlp" or "mixer" not in inside else inside


def _alike(site: Mapping[str, Any]) -> str:
    return re.sub(r"\.\d+\.", ".", site["name"], count=1)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    more = f' class="{kind}"' if kind else ""
    more += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x}" y="{y}"{more}>{escape(text)}</text>'
