"""prunekit beside the code that the authors of Týr-the-Pruner released, in one run, on the same tokens.

    git clone https://github.com/AMD-AGI/Tyr-the-Pruner
    python benchmarks/beside_tyr.py MODEL --released Tyr-the-Pruner --dataset calibration.txt --evaluation other.txt

The released scripts run as they are but for the device: where they say cuda, they get the CPU, and gloo for nccl. They
are given few tokens, levels of an eighth and one round; everything else is theirs, the clocks too: loading, imports,
the dense model's logits and evaluations are not on them. Both results are measured by
prunekit's own evaluation. Released Týr cuts query heads and leaves keys and values whole; prunekit cuts whole KV
groups, so that its attention loses more parameters at the same sparsity.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import prunekit
from prunekit.data.draws import Draws, draw
from prunekit.measure.perplexity import perplexity
from prunekit.models.opening import opened
from prunekit.recipe.overrides import parsed
from prunekit.recipe.schema import Recipe

AS_THEY_ARE = """
import sys, runpy, pathlib
import torch
path = pathlib.Path(sys.argv[1])
source = path.read_text()
for old, new in {'f"cuda:{rank}"': '"cpu"', 'f"cuda"': '"cpu"', '"nccl"': '"gloo"', 'device_map=None if args.memory_efficient else "auto"': 'device_map=None'}.items():
    source = source.replace(old, new)
sys.path.insert(0, str(path.parent))
sys.argv = sys.argv[1:]
exec(compile(source, str(path), "exec"), {"__name__": "__main__"})
"""  # noqa: E501


@dataclass(frozen=True)
class Found:
    """What a way of pruning came to."""

    name: str
    seconds: float
    forwards: int  # tokens times allocations judged
    value: float  # perplexity


def main(
    model: str,
    released: Annotated[Path, typer.Option(help="a checkout of the released code")],
    dataset: str = "python-docs",
    evaluation: str | None = None,
    seqlen: int = 256,
    tokens: int = 65_536,
    sparsity: Annotated[str, typer.Option(help="by comma")] = "0.5,0.7",
    generations: int = 10,
    offspring: int = 16,
    recipes: Annotated[str, typer.Option(help="of prunekit, by comma; each with settings, by +")] = (
        "fast+data.calibration_tokens=16384,lean+data.calibration_tokens=8192,lean+data.calibration_tokens=12288,"
        "default+allocator=table,default+allocator=evolution"
    ),
) -> None:
    """Print a Markdown table for each sparsity, with ratios to the released code."""
    for share in map(float, sparsity.split(",")):
        shared = {
            "model": model, "sparsity": share, "verify": False, "data.dataset": dataset.split(","),
            "data.evaluation_dataset": evaluation, "data.seqlen": seqlen, "data.calibration_tokens": tokens,
            "data.search_tokens": tokens, "data.evaluation_tokens": tokens,
        }  # fmt: skip
        dense = opened(model, dtype="float32")
        draws = draw(dense.tokenizer, Recipe.load().with_overrides(shared).data)
        theirs = tyr(model, released.resolve(), dense.model, draws, share, generations, offspring)
        print(f"\nsparsity {share:g}; {draws.calibration.n_tokens:,} tokens; {torch.get_num_threads()} threads\n")
        print("| | seconds | as fast | token-forwards | fewer | perplexity |\n|---|---|---|---|---|---|", flush=True)
        show(theirs, theirs)
        for said in recipes.split(","):
            show(ours(said, shared), theirs)


def show(found: Found, theirs: Found) -> None:
    fewer = f"{theirs.forwards / found.forwards:.1f}x" if found.forwards else "none"
    fast = f"{theirs.seconds / found.seconds:.1f}x"
    print(
        f"| {found.name} | {found.seconds:.0f} | {fast} | {found.forwards:,} | {fewer} | {found.value:.2f} |",
        flush=True,
    )


def ours(said: str, shared: dict[str, Any]) -> Found:
    """A recipe and its settings, on its own clock, without what is only measured."""
    name, *settings = said.split("+")
    recipe = Recipe.load(name).with_overrides(shared | dict(map(parsed, settings)))
    report = prunekit.prune(recipe=recipe, quiet=True).report
    spent = sum(seconds for stage, seconds in report["seconds"].items() if stage != "evaluate")
    forwards, value = report["search"]["token_forwards"], report["losses"]["pruned"]["perplexity"]
    return Found(f"prunekit, {said}", spent, forwards, value)


def tyr(model: str, released: Path, dense: Any, draws: Draws, share: float, generations: int, offspring: int) -> Found:
    """Both scripts, one round."""
    config = dense.config
    heads = config.hidden_size * config.hidden_size // config.num_attention_heads
    neurons = config.hidden_size * config.intermediate_size // 8
    stages, survivors = (512, 2048, 8192), (4, 2, 1)
    with tempfile.TemporaryDirectory() as folder:
        for name, batch in {"calibration": draws.calibration, "search": draws.search}.items():
            torch.save(list(batch.ids.split(1)), Path(folder) / f"{name}.pt")
        shared = [
            "--model_name_or_path", model, "--calibration_sequence_length", str(draws.calibration.seqlen),
            "--calibration_tokens", str(draws.calibration.n_tokens), "--dtype", "float32",
            "--attn_implementation", "sdpa",
        ]  # fmt: skip
        said = run(
            released / "prune_to_supernet.py", folder, *shared, "--calibration_data", f"{folder}/calibration.pt",
            "--prunable_modules", r"^(?!.*(?:embedding|emb|head)).+$", "--pre_block_modules", "model.embed_tokens",
            "model.rotary_emb", "--block_modules", "model.layers", "--sparsity", str(share), "--error_accumulation",
            "--weights_diff_mlp", str(neurons), "--weights_diff_mha", str(heads), "--save_dir", f"{folder}/net",
            "--num_sparsity_levels", "9",
        )  # fmt: skip
        built = sum(map(float, re.findall(r"Pruning to supernet took ([\d.]+) s", said)))
        said = run(
            released / "search_sparsity_dist.py", folder, *shared, "--calibration_data", f"{folder}/search.pt",
            "--eval_datasets", f"{folder}/search.pt", "--eval_tokens", str(draws.search.seqlen),
            "--eval_every", str(generations), "--eval_sequence_length", str(draws.search.seqlen),
            "--fitness_fn", "sparse_kl", "--kl_topk", "512", "--offspring", str(offspring),
            "--generations", str(generations), "--sparse_weights_path", f"{folder}/net",
            "--configuration_name", "found.txt", "--tokens_per_selection", *map(str, stages),
            "--survivors_per_selection", *map(str, survivors),
        )  # fmt: skip
        searched = sum(map(float, re.findall(r"One generation time: ([\d.e+-]+) s", said)))
        for line in (Path(folder) / "net" / "found.txt").read_text().splitlines():
            layer, level = line.split(":")
            weight = torch.load(Path(folder) / "net" / layer.strip() / f"{int(level)}.pth", weights_only=True)
            dense.get_submodule(layer.strip()).weight.data.copy_(weight)
        judged = sum(count * each for count, each in zip((offspring, *survivors[:-1]), stages, strict=True))
        forwards = generations * (judged + stages[-1])  # the parent joins the last stage
        name = f"released Týr ({built:.0f} s supernet, {searched:.0f} s search)"
        return Found(name, built + searched, forwards, perplexity(dense, draws.evaluation).value)


def run(script: Path, folder: str, *arguments: str) -> str:
    """What a released script prints, in a process of its own."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29509"}
    result = subprocess.run(
        [sys.executable, "-c", AS_THEY_ARE, str(script), *arguments],
        check=False, cwd=folder, env=os.environ | world, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)
    return result.stdout


if __name__ == "__main__":
    typer.run(main)
