"""What the mask of a learner alone costs on text behind that it was learned on: dense weights, nothing refitted.

    python benchmarks/masks.py MODEL text.txt --learner "bypass-bp steps=384 batch_tokens=256" --sparsity 0.7

One row for every learner and sparsity: nats per token, and the groups that sites keep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunekit import TokenBatch
from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.learner import GateProblem, GateQuery
from prunekit.plugins.registry import LEARNERS
from prunekit.recipe.overrides import parsed
from prunekit.search.gated import GatedModel
from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.testing.learners import lesson, mask_of


def main(
    model: str,
    text: Path,
    learner: Annotated[list[str], typer.Option(help="a name and options, as 'gisp steps=16'")],
    sparsity: Annotated[list[float] | None, typer.Option()] = None,
    skip: Annotated[int, typer.Option(help="tokens in front of what is learned on")] = 16_384,
    tokens: Annotated[int, typer.Option(help="to learn on")] = 16_384,
    judged: Annotated[int, typer.Option(help="tokens behind them")] = 8_192,
    seqlen: int = 256,
) -> None:
    """Print a Markdown table."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    adapter = adapter_for(dense.config.model_type)
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"])
    own, held = ids[skip : skip + tokens].reshape(-1, seqlen), ids[skip + tokens :][:judged].reshape(-1, seqlen)
    sites = adapter.sites(dense)
    learned, behind = (GatedModel(dense, adapter, sites, TokenBatch(each, text.name)) for each in (own, held))
    print("| sparsity | learner | nats per token | kept |\n|---|---|---|---|")
    for share in sparsity or [0.5]:
        problem = GateProblem((Space.whole(sites, Budget.keeping(1 - share, sites)),), len(own), seqlen)
        for each in learner:
            name, *options = each.split()
            plugin = LEARNERS.build({"name": name, **dict(map(parsed, options))})
            decision = lesson(plugin, problem, learned.answer).decisions[0]
            loss = behind.answer(GateQuery(mask_of(decision, problem.knapsacks[-1].sizes))).loss
            print(f"| {share:.0%} | {each} | {loss:.4f} | {' '.join(map(str, decision.counts))} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
