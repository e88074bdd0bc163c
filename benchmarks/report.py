"""Rows to a table: what run.py wrote, one line per cell and sparsity, seeds as mean ± half the spread.

python benchmarks/report.py rows.jsonl
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; perplexities carry their label, sparsity is counted in the tensors."""
    cells: dict[tuple[float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["sparsity"], row["cell"]].append(row)
    dense = rows[0]["report"]["losses"]["dense"]
    lines = [
        f"Dense: {dense['perplexity']:.2f} ({dense['label']})",
        "",
        "| asked | cell | perplexity | block parameters removed | token-forwards | prune, search s | wall s | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (sparsity, cell), found in cells.items():
        reports = [row["report"] for row in found]
        values = [report["losses"]["pruned"]["perplexity"] for report in reports]
        mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
        seconds = reports[0]["seconds"]
        lines.append(
            f"| {sparsity:.0%} | {cell} | {mean:.2f}{f' ± {spread:.2f}' if len(values) > 1 else ''} "
            f"| {min(report['pruned']['sparsity_of_blocks'] for report in reports):.4%} "
            f"| {sum(report['search']['token_forwards'] for report in reports) // len(reports):,} "
            f"| {seconds['prune']:.0f}, {seconds['search']:.0f} "
            f"| {sum(row['wall'] for row in found) / len(found):.0f} | {len(found)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
