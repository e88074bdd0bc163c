"""Rows to tables: what run.py wrote, seeds as mean ± half the spread.

python benchmarks/report.py rows.jsonl more.jsonl           # a line per cell and sparsity, with what it cost
python benchmarks/report.py rows.jsonl more.jsonl --short   # a line per cell: perplexity at every sparsity
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

Rows = list[dict[str, Any]]


def main(files: list[Path], short: Annotated[bool, typer.Option(help="Perplexities side by side.")] = False) -> None:
    """Print Markdown; perplexities carry their label, sparsity is counted in the tensors."""
    rows: Rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    dense = rows[0]["report"]["losses"]["dense"]
    if labels := {row["report"]["losses"]["dense"]["label"] for row in rows} - {dense["label"]}:
        raise typer.BadParameter(f"{dense['label']} cannot be compared with {', '.join(sorted(labels))}")
    print(f"Dense: {dense['perplexity']:.2f} ({dense['label']})\n")
    print("\n".join(side_by_side(rows) if short else at_length(rows)))


def at_length(rows: Rows) -> list[str]:
    """A line per cell and sparsity."""
    lines = [
        "| asked | cell | perplexity | removed | token-forwards | prune, search s | wall s | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (sparsity, cell), found in by_cell(rows).items():
        reports = [row["report"] for row in found]
        seconds = reports[0]["seconds"]
        lines.append(
            f"| {sparsity:.0%} | {cell} | {perplexity(found)} | {min(map(removed, reports)):.4%} "
            f"| {sum(report['search']['token_forwards'] for report in reports) // len(reports):,} "
            f"| {seconds['prune']:.0f}, {seconds['search']:.0f} "
            f"| {sum(row['wall'] for row in found) / len(found):.0f} | {len(found)} |"
        )
    return lines


def side_by_side(rows: Rows) -> list[str]:
    """A line per cell; its token-forwards are the most it took at any sparsity."""
    cells, shares = by_cell(rows), sorted({row["sparsity"] for row in rows})
    lines = ["| cell |" + "".join(f" {share:.0%} |" for share in shares) + " token-forwards |"]
    lines.append("|---|" + "---|" * len(shares) + "---|")
    for name in dict.fromkeys(cell for _, cell in cells):
        found = [cells.get((share, name), []) for share in shares]
        paid = max(row["report"]["search"]["token_forwards"] for some in found for row in some)
        lines.append(f"| {name} |" + "".join(f" {perplexity(some)} |" for some in found) + f" {paid:,} |")
    return lines


def by_cell(rows: Rows) -> dict[tuple[float, str], Rows]:
    """The rows of every cell at every sparsity, one per seed."""
    cells: dict[tuple[float, str], Rows] = defaultdict(list)
    for row in rows:
        cells[row["sparsity"], row["cell"]].append(row)
    return cells


def perplexity(found: Rows) -> str:
    """Mean over seeds, and half the distance of the extremes; nothing where there is nothing."""
    if not found:
        return ""
    values = [row["report"]["losses"]["pruned"]["perplexity"] for row in found]
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.2f}" + (f" ± {spread:.2f}" if len(values) > 1 else "")


def removed(report: dict[str, Any]) -> float:
    """Share of the blocks' parameters that is gone, or of their linear maps' weights that is zero."""
    if (weights := report.get("weights")) is not None:
        return 1 - weights["not_zero"] / weights["in_linear_maps"]
    return report["pruned"]["sparsity_of_blocks"]


if __name__ == "__main__":
    typer.run(main)
