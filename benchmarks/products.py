"""How fast second moments of bfloat16 are made on this CPU, with and without its matrix units, and how exactly.

    python benchmarks/products.py --widths 576,1536

Both take turns in one process. Errors are of the largest value, against the same moments in float64.
"""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
import typer

from prunekit.calibration.moments import precise
from prunekit.system.products import has_units, of_halves


def main(tokens: int = 2048, widths: str = "576,1536", rounds: int = 20, threads: int | None = None) -> None:
    """Print a Markdown table."""
    if threads is not None:
        torch.set_num_threads(threads)
    print(f"{torch.get_num_threads()} threads, {'with' if has_units() else 'without'} matrix units for bfloat16")
    print("\n| tokens x inputs | GFLOP/s in float32 | error | GFLOP/s with units | error |\n|---|---|---|---|---|")
    for width in map(int, widths.split(",")):
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact, cells = x.double().T @ x.double(), list[str]()
        ways = (nullcontext, lambda x=x: of_halves(x))
        took = [[0.0] * rounds for _ in ways]
        errors = [0.0] * len(ways)
        for turn in range(-1, rounds):  # the first pays for what later ones find ready
            for i, way in enumerate(ways):
                with way():
                    started = time.perf_counter()
                    found = precise(x).T @ precise(x)
                    if turn >= 0:
                        took[i][turn] = time.perf_counter() - started
                errors[i] = float((found.double() - exact).abs().max() / exact.abs().max())
        for seconds, error in zip(took, errors, strict=True):
            cells += [f"{2 * tokens * width**2 / sorted(seconds)[rounds // 2] / 1e9:,.0f}", f"{error:.0e}"]
        print(f"| {tokens:,} x {width:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
