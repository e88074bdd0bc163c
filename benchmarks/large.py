"""Peak memory of pruning a checkpoint that is larger: random weights of a Llama or a Mixtral, 4 GB and more.

    python benchmarks/large.py /somewhere/with/20/GB --memory 1.7GB

The checkpoint is made tensor by tensor and pruned in a process of its own, which says how much memory it had at most.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

import prunekit
from prunekit.demo import MODEL
from prunekit.models.shards import write
from prunekit.recipe.overrides import parsed
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.system.sizes import amount

ALLOWED = 1.5e9  # bytes beside one block and the activations


def main(
    folder: Path,
    memory: Annotated[str, typer.Option(help="what the run may take, as prunekit prune --memory")] = "1.7GB",
    layers: int = 46,
    hidden: int = 2048,
    d_ff: int = 5632,
    heads: int = 32,
    kv_heads: int = 4,
    experts: Annotated[int, typer.Option(help="of every block, as Mixtral has them; 0: none")] = 0,
    tokens: Annotated[int, typer.Option(help="of calibration; half as many to evaluate")] = 128,
    seqlen: int = 64,
    setting: Annotated[list[str] | None, typer.Option("--set", help="key.path=value of the recipe")] = None,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Make the checkpoint where it is not there, prune it, and hold the peak against what is allowed."""
    dense, small = folder / "dense", folder / "small"
    if child:
        print(json.dumps(pruned(dense, small, memory, tokens, seqlen, setting or [])))
        return
    if not (dense / "config.json").exists():
        made(dense, hidden, d_ff, layers, heads, kv_heads, experts)
    command = [sys.executable, __file__, str(folder), "--child", "--memory", memory, "--tokens", str(tokens)]
    command += ["--seqlen", str(seqlen), *(part for each in setting or [] for part in ("--set", each))]
    begun = time.perf_counter()
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(out.splitlines()[-1])
    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    allowed = ALLOWED + found["block"] + found["activations"]
    print(f"checkpoint    {amount(size)}, in the dtype of the computation {amount(found['computed'])}")
    print(f"before        {amount(found['before'])}: Python and libraries")
    print(f"peak          {amount(found['peak'])}")
    print(f"allowed       {amount(allowed)} = 1.5 GB + a block of {amount(found['block'])} + activations")
    print(f"activations   {amount(found['activations'])} may stay in memory")
    print(f"wall          {time.perf_counter() - begun:.0f} s: {found['seconds']}")
    shutil.rmtree(small)
    if found["peak"] > allowed:
        raise typer.Exit(1)


def made(folder: Path, hidden: int, d_ff: int, layers: int, heads: int, kv_heads: int, experts: int) -> None:
    """A checkpoint in bfloat16 and shards of 1 GB; one tensor in memory."""
    config: Any = AutoConfig.for_model(
        "mixtral" if experts else "llama",
        hidden_size=hidden,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        dtype="bfloat16",
        **({"num_local_experts": experts} if experts else {}),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, state_dict={})
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    state: dict[str, torch.Tensor] = revert_weight_conversion(
        model, model.state_dict()
    )  # a file has every expert apart
    draw = torch.Generator().manual_seed(0)

    def drawn(name: str) -> torch.Tensor:
        shape = state[name].shape
        return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else _normal(shape, draw)

    write(folder, state, drawn, shard_bytes="1GB")


def _normal(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=draw)


def pruned(dense: Path, small: Path, memory: str, tokens: int, seqlen: int, settings: list[str]) -> dict[str, Any]:
    """Prune in this process; what it took."""
    from prunekit.models.opening import skeleton
    from prunekit.run.session import make_plan

    recipe = Recipe.load().with_overrides(
        {
            "model": str(dense),
            "memory": memory,
            "pruner": "magnitude",
            "allocator": "uniform",  # one rung per site; of several, judging each takes a product in float64
            "objective": "expected-error",
            "rebuild": False,
            "verify": False,
            "data.dataset": "python-docs",
            "data.calibration_tokens": tokens,
            "data.search_tokens": tokens,
            "data.evaluation_tokens": tokens // 2,
            "data.seqlen": seqlen,
            **dict(map(parsed, settings)),
        }
    )
    model, adapter = skeleton(str(dense))
    plan = make_plan(resolve(recipe), model, adapter, small)
    before = _peak()
    report = prunekit.prune(recipe=recipe, output=small, overwrite=True).report
    return {
        "before": before,
        "peak": _peak(),
        "block": plan.block,
        "computed": sum(p.numel() for p in model.parameters()) * 4,
        "activations": plan.shares.activations,
        "paged": plan.paged,
        "seconds": report["seconds"],
    }


def _peak() -> int:
    """Bytes of this process in memory at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    typer.run(main)
