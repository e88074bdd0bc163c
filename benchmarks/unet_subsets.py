"""How often whole operators of a U-Net are removed as well as can be: against all subsets, on tiny random U-Nets.

    python benchmarks/unet_subsets.py --seeds 10

Every U-Net has eight operators, float64, three latents of two DDIM steps. Needs the extra prunekit[diffusers].
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from prunekit.plugins.registry import ALLOCATORS, OBJECTIVES
from prunekit.search.ledger import Ledger
from prunekit.space.sites import Allocation
from prunekit.system.progress import Progress
from prunekit_strategies.diffusion import unets
from prunekit_strategies.diffusion.latents import Conditions, Latents, make_noise
from prunekit_strategies.diffusion.prune import make_space, run_search

SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6)


def make(seed: int, sparsity: float) -> Latents:
    """Answers about a random U-Net."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(4,), layers_per_block=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=2, norm_num_groups=2,
    ).double().eval()  # fmt: skip
    operators = unets.operators(unet)
    space = make_space(operators, unets.count(unet), sparsity)
    noise = make_noise(3, (2, 4, 4), seed).double()
    return Latents(unet, DDIMScheduler(), operators, space, 2, noise, Conditions(None, None))


def main(seeds: Annotated[int, typer.Option(help="Random U-Nets.")] = 10) -> None:
    """Print a line for every order of removal."""
    judge, found = OBJECTIVES.build("latent-stats"), dict[str, list[tuple[bool, float]]]()
    for seed in range(seeds):
        net = make(seed, SPARSITIES[0])
        every: Iterable[Allocation] = product((0, 1), repeat=len(net.operators))
        table: dict[Allocation, float] = {a: net.loss(judge, a, net.batch) for a in every}
        for sparsity in SPARSITIES:
            net = make(seed, sparsity)
            best = min(loss for allocation, loss in table.items() if net.space.is_feasible(allocation))
            for order in ("once", "greedy"):
                drop = ALLOCATORS.build({"name": "drop", "order": order, "compete": False})
                with tempfile.TemporaryDirectory() as folder:
                    ledger = Ledger(Path(folder) / "ledger.jsonl")
                    answer, _ = run_search(drop, judge, net, ledger, 0, Progress())
                found.setdefault(order, []).append((table[answer] == best, table[answer] / best))
    print(f"| order | optimum of {len(found['once'])} | median of J / J of the optimum | largest |")
    print("|---|---|---|---|")
    for order, rows in found.items():
        ratios = [ratio for _, ratio in rows]
        print(f"| {order} | {sum(hit for hit, _ in rows)} | {median(ratios):.3f} | {max(ratios):.3f} |")


if __name__ == "__main__":
    typer.run(main)
