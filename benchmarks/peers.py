"""prunekit beside the code that others released, on the same tokens, by one judge.

    git clone https://github.com/CASIA-IVA-Lab/FLAP                   # FLAP and Wanda-sp
    git clone https://github.com/microsoft/TransformerCompression     # SliceGPT; pip install ml-collections
    git clone https://github.com/horseee/LLM-Pruner
    git clone https://github.com/AMD-AGI/Tyr-the-Pruner
    python benchmarks/peers.py MODEL --flap FLAP --wanda-sp FLAP --slicegpt TransformerCompression \\
        --llm-pruner LLM-Pruner --tyr Tyr-the-Pruner --dataset calibration.txt --evaluation other.txt \\
        --sparsity 0.2,0.3,0.5 --tokens 16384 --seqlen 512 --rows rows.jsonl

A peer whose path is not given is left out. Every peer runs at every sparsity in a process of its own, its functions
called as its own scripts call them, with their defaults; what it needs to run here is in its row, and so is why it did
not run. Parameters are counted in the tensors that it hands back. The seconds are those of its pruning, without
imports, loading and evaluation. All run on the CPU, in float32.

Behind every peer comes recipe `fast` with `time` set to the peer's seconds, or to the least that its plan allows where
that is more, on at most the peer's calibration tokens, at the sparsity that the peer realised: zeros that it left in
its tensors count as removed there. Its seconds are all of the call but evaluation: imports, loading and the plan are in
them. And the same method as we have it, on the same tokens, at that size: `same`.

Some peers know no grouped heads. `--ungroup` gives all, ours too, the same model with a copy of its keys and values for
every query head: the same function, with more parameters.

A row that is in the file already is not run again unless it failed, so a run can be stopped and gone on with.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import torch
import typer

import prunekit
from prunekit.data.draws import Draws, draw
from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.measure.perplexity import perplexity
from prunekit.models.opening import opened, stored_as
from prunekit.recipe.schema import Recipe

Row = dict[str, Any]
Work = Callable[[], float | None]  # prunes; its seconds, where it has a clock of its own
LEAST = 2_048  # tokens of text that ours does not need here, but draws
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


class Refused(Exception):
    """What the released code does not do."""


@dataclass(frozen=True)
class Peer:
    """Somebody's released code."""

    title: str
    prepare: Callable[[Path, Any, Draws, float], Work]  # its folder, the model that it changes, tokens, share to remove
    shims: tuple[str, ...] = ()  # what it needs to run here
    same: Mapping[str, Any] | None = None  # the same method here: a preset, and what of it changes


def flap_of(method: str) -> Callable[[Path, Any, Draws, float], Work]:
    """FLAP and Wanda-sp, of one file, as its shell scripts call them."""

    def prepare(folder: Path, model: Any, draws: Draws, share: float) -> Work:
        config, ids = model.config, draws.calibration.ids
        if config.num_key_value_heads != config.num_attention_heads:
            raise Refused("cuts keys and values by the mask of the query heads: knows no grouped heads")
        size = model.model.layers[0].self_attn.head_dim
        changes = {"(-1, 128)": f"(-1, {size})", "-1, 128)": f"-1, {size})", "interleave(128)": f"interleave({size})"}
        changes |= {"512.0 / 3": f"{4 * size} / 3", "torch.half": "torch.float32", ".cuda()": ""}
        released: Any = changed("lib.prune", folder / "lib" / "prune.py", changes)
        released.get_loaders = lambda *_, **__: ([(row[None], None) for row in ids], None)
        rotary = model.model.rotary_emb

        def turned(_: Any, args: Any, told: dict[str, Any]) -> Any:
            return args, {"position_embeddings": rotary(args[0], told["position_ids"])} | told

        for layer in model.model.layers:
            layer.register_forward_pre_hook(turned, with_kwargs=True)
            layer.self_attn.num_heads = config.num_attention_heads
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj) if method == "prune_flap" else ():
                linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features, device=model.device), False)
        model.seqlen = draws.calibration.seqlen
        asked = SimpleNamespace(nsamples=len(ids), seed=0, pruning_ratio=share, remove_heads=-1)
        asked.metrics, asked.structure, asked.unstr = "WIFV", "AL-AM", False
        return lambda: getattr(released, method)(asked, model, None, model.device)

    return prepare


def slicegpt(folder: Path, model: Any, draws: Draws, share: float) -> Work:
    """SliceGPT as `experiments/run_slicegpt.py` calls it; a sparsity is the share of the hidden size that goes."""
    import numpy as np

    sys.path.insert(0, str(folder / "src"))
    fusion, rotate = import_module("slicegpt.layernorm_fusion"), import_module("slicegpt.rotate")
    import_module("slicegpt.config").config.device = model.device
    adapter = import_module("slicegpt.adapters.llama_adapter").LlamaModelAdapter(model)
    adapter.use_cache, model.config.dtype = False, model.dtype
    kept = int((1 - share) * adapter.hidden_size)
    scheduler = import_module("slicegpt.slicing_scheduler").ConstSlicingScheduler(kept - kept % 8)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draws.calibration.ids.split(16)]

    def work() -> None:
        np.random.seed(0)
        fusion.replace_layers(adapter)
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda _, __, out: (*out, None))
            layer.register_forward_hook(lambda _, __, out: out[0])
        fusion.fuse_modules(adapter)
        rotate.rotate_and_slice(adapter, batches, scheduler, final_orientation="random")

    return work


def llm_pruner(folder: Path, model: Any, draws: Draws, share: float) -> Work:
    """LLM-Pruner as `llama3.py` calls it, block-wise by first-order Taylor, at the borders of its README."""
    for name in ("LLMPruner", "LLMPruner.pruner"):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
    sys.path.insert(0, str(folder))
    pruning, llama = import_module("LLMPruner.torch_pruning"), import_module("LLMPruner.pruner.hf_llama_pruner")
    norm = import_module("transformers.models.llama.modeling_llama").LlamaRMSNorm
    layers, ids = model.model.layers, draws.calibration.ids.to(model.device)
    first, behind = round(len(layers) * 4 / 32), len(layers) - max(1, round(len(layers) * 2 / 32))
    inner = layers[first:behind]
    model.config.use_cache = False
    model.set_attn_implementation("eager")
    model.requires_grad_(True)

    def work() -> None:
        pruner = pruning.pruner.MetaPruner(
            model,
            ids[:2, :8],
            importance=llama.TaylorImportance(group_reduction="sum", taylor="param_first"),
            ch_sparsity=share * len(layers) / len(inner),
            consecutive_groups={layer.self_attn.k_proj: layer.self_attn.head_dim for layer in layers},
            customized_pruners={norm: llama.hf_rmsnorm_pruner},
            root_module_types=None,
            root_instances=[layer.self_attn.k_proj for layer in inner] + [layer.mlp.gate_proj for layer in inner],
        )
        model.zero_grad()
        for row in ids.split(1):
            (model(row, labels=row).loss / len(ids)).backward()
        pruner.step()
        model.zero_grad()
        model.requires_grad_(False)

    return work


def tyr(folder: Path, model: Any, draws: Draws, share: float) -> Work:
    """Both scripts of Týr, as in `beside_tyr.py`."""
    from beside_tyr import tyr as both

    here = Path(model.name_or_path)  # its scripts run in another folder
    source = str(here.resolve()) if here.exists() else model.name_or_path
    return lambda: both(source, folder, model, draws, share, generations=10, offspring=16).seconds


LAYERS = "a hook hands rotary embeddings to layers that are called without"
HEADS = "128 as the size of a head, and 512/3 as its price in neurons, are those of the model"
FLOAT = "float32 where it says half; no .cuda()"
THIRD = "a hook adds the third value that attention no longer returns"
TUPLE = "a hook takes the hidden states out of the tuple that its layer returns"
NAMES = "its adapter gets the model in float32: its loader takes only the names of Llama 2 and 3"
ALONE = "its packages without their __init__, which need sentencepiece for other models"
EAGER = "eager attention and no cache, so that its graph sees the repeated keys"
WINDOWS = "gradients of one window at a time, which sum to those of its one batch"
BORDERS = "4 first and 2 last of 32 blocks whole, in proportion; the others cut so much more"
CPU = "the CPU for cuda, gloo for nccl"
SMALL = "one round of ten generations of 16 on few tokens, levels of an eighth"
ZEROS = "it hands back zeros in tensors of the old sizes"
LLM_PRUNER = {"recipe": "llm-pruner", "finishers": (), "apart": True}
WANDA_SP = {
    "recipe": "ziplm", "pruner": {"name": "wanda", "within": "block"}, "allocator": "uniform", "finishers": (),
    "carry": "centre", "apart": True,
}  # fmt: skip
PEERS = {
    "flap": Peer(
        "FLAP", flap_of("prune_flap"), (LAYERS, HEADS, FLOAT, "zero biases on o_proj and down_proj"), {"recipe": "flap"}
    ),
    "wanda-sp": Peer("Wanda-sp", flap_of("prune_wanda_sp"), (LAYERS, HEADS, FLOAT), WANDA_SP),
    "slicegpt": Peer("SliceGPT", slicegpt, (THIRD, TUPLE, NAMES), {"recipe": "slicegpt"}),
    "llm-pruner": Peer("LLM-Pruner", llm_pruner, (ALONE, EAGER, WINDOWS, BORDERS), LLM_PRUNER),
    "tyr": Peer("Týr", tyr, (CPU, SMALL, ZEROS)),
}


def changed(name: str, path: Path, changes: Mapping[str, str]) -> ModuleType:
    """A module of somebody's, with other constants; the file stays as it is."""
    sys.path.insert(0, str(path.parents[1]))
    module, source = ModuleType(name), path.read_text()
    module.__package__ = name.rpartition(".")[0]
    for old, new in changes.items():
        source = source.replace(old, new)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


@dataclass(frozen=True)
class Job:
    """What a process of its own does."""

    model: str
    draws: Draws
    share: float = 0.0


def dense(job: Job) -> Row:
    """The model as it is."""
    model = opened(job.model, device="cpu", dtype="float32").model
    return counted(model) | judged(model, job.draws.evaluation)


def theirs(job: Job, name: str, folder: Path) -> Row:
    """A peer's result."""
    torch.manual_seed(0)
    model: Any = opened(job.model, device="cpu", dtype="float32").model
    work = PEERS[name].prepare(folder.resolve(), model, job.draws, job.share)
    began = time.perf_counter()
    with redirect_stdout(sys.stderr):  # the table stands alone on ours
        took = work()
    seconds = time.perf_counter() - began if took is None else took
    told = {"seconds": seconds, "tokens": job.draws.calibration.n_tokens, "shims": PEERS[name].shims}
    return told | counted(model) | judged(model, job.draws.evaluation)


def ours(job: Job, shared: Mapping[str, Any], seconds: float | None) -> Row:
    """Recipe `fast`, in a time or on all the tokens."""
    own = {"model": job.model, "sparsity": job.share, "device": "cpu", "verify": False}
    whole = {**shared, **own, "data.evaluation_tokens": LEAST}
    most = whole["data.calibration_tokens"]
    tries = [whole]
    if seconds is not None:
        tries = [whole | {"time": seconds}, whole | {"time": seconds, "data.calibration_tokens": None}]
    for settings in tries:
        began = time.perf_counter()
        try:
            result = prunekit.prune(recipe=Recipe.load("fast").with_overrides(settings), quiet=True)
        except WrongInput as error:
            least = re.search(r"too short: .* about ([\d.:]+) (s|min|h) ", str(error))
            if least is None or len(tries) == 6:  # the speed of the machine is measured anew for every plan
                raise
            if settings is not tries[0]:
                big, _, small = least[1].partition(":")
                asked = 1.1 * UNITS[least[2]] * (float(big) + float(small or 0) / 60)
                tries.append(whole | {"data.calibration_tokens": min(LEAST, most), "time": asked})
            continue
        spent = time.perf_counter() - began - result.report["seconds"]["evaluate"]
        tokens = result.report["data"]["calibration"]["tokens"]
        if tokens > most:  # the machine was faster at the second plan
            tries.append(whole)
            continue
        told = {"seconds": spent, "tokens": tokens, "asked": settings.get("time", seconds)}
        model = stored_as(result.model, torch.float32)
        return told | counted(model) | judged(model, job.draws.evaluation)
    raise AssertionError("the last try returns or raises")


def as_published(job: Job, shared: Mapping[str, Any], same: Mapping[str, Any]) -> Row:
    """A peer's method as we have it, on all of its tokens."""
    changes = {key: value for key, value in same.items() if key != "recipe"}
    own = {"model": job.model, "sparsity": job.share, "device": "cpu", "verify": False, "data.evaluation_tokens": LEAST}
    recipe = Recipe.load(same["recipe"]).with_overrides({**shared, **own, **changes})
    began = time.perf_counter()
    result = prunekit.prune(recipe=recipe, quiet=True)
    seconds = time.perf_counter() - began - result.report["seconds"]["evaluate"]
    told = {"seconds": seconds, "tokens": job.draws.calibration.n_tokens}
    model = stored_as(result.model, torch.float32)
    return told | counted(model) | judged(model, job.draws.evaluation)


def counted(model: Any) -> Row:
    """Parameters in tensors; `blocks_whole` without those that only read or write columns of zeros."""
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    zeros = 0
    for module in model.model.layers.modules():
        for reader, writers in (("o_proj", ("q_proj",)), ("down_proj", ("gate_proj", "up_proj"))):
            if isinstance(linear := getattr(module, reader, None), torch.nn.Linear):
                rows = [linear.weight.shape[0]] + [getattr(module, writer).weight.shape[1] for writer in writers]
                zeros += int((linear.weight == 0).all(0).sum()) * sum(rows)
    return {"blocks": blocks, "blocks_whole": blocks - zeros, "parameters": sum(p.numel() for p in model.parameters())}


def judged(model: Any, evaluation: TokenBatch) -> Row:
    """Perplexity, with its label."""
    found = perplexity(model, evaluation)
    return {"perplexity": found.value, "label": found.label}


def alone(function: Callable[..., Row], *arguments: Any) -> Row:
    """What a function gives in a process of its own, or why it gave nothing."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except (Exception, SystemExit) as error:
        said = str(error).strip().splitlines() or [""]
        return {"failed": said[-1] if isinstance(error, Refused) else f"{type(error).__name__}: {said[-1]}"[:300]}


def ungrouped(source: str, folder: str) -> str:
    """Save the same model with keys and values of its own for every query head; return the folder."""
    grouped = opened(source, device="cpu", dtype="float32")
    config, state = copy.deepcopy(grouped.model.config), grouped.model.state_dict()
    groups = config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    for key, value in state.items():
        if ".k_proj." in key or ".v_proj." in key:
            heads = value.reshape(groups, -1, *value.shape[1:])
            state[key] = heads.repeat_interleave(config.num_attention_heads // groups, 0).flatten(0, 1)
    model = type(grouped.model)(config)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    grouped.tokenizer.save_pretrained(folder)
    return folder


def main(
    model: str,
    flap: Path | None = None,
    wanda_sp: Path | None = None,
    slicegpt: Path | None = None,
    llm_pruner: Path | None = None,
    tyr: Path | None = None,
    dataset: Annotated[str, typer.Option(help="several by comma")] = "python-docs",
    evaluation: str | None = None,
    sparsity: Annotated[str, typer.Option(help="of the blocks, by comma")] = "0.2,0.3,0.5",
    tokens: Annotated[int, typer.Option(help="of calibration")] = 16_384,
    evaluation_tokens: int = 65_536,
    seqlen: int = 256,
    ungroup: Annotated[bool, typer.Option(help="a copy of keys and values for every query head")] = False,
    rows: Path = Path("rows.jsonl"),
) -> None:
    """Run what is not in `rows` yet, and print a Markdown table for each sparsity."""
    paths = {"flap": flap, "wanda-sp": wanda_sp, "slicegpt": slicegpt, "llm-pruner": llm_pruner, "tyr": tyr}
    shared = {
        "data.dataset": dataset.split(","), "data.evaluation_dataset": evaluation, "data.seqlen": seqlen,
        "data.calibration_tokens": tokens, "data.search_tokens": LEAST,
    }  # fmt: skip
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []

    def row(told: Row, function: Callable[..., Row], *arguments: Any) -> Row:
        told |= {"model": model, "ungroup": ungroup, "calibration": digests[0], "evaluation": digests[1]}
        for before in done:
            if "failed" not in before and told.items() <= before.items():
                return before
        done.append(told | {"load": os.getloadavg()[0]} | alone(function, *arguments))  # of the machine, before
        with rows.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(done[-1], file=sys.stderr, flush=True)
        return done[-1]

    with tempfile.TemporaryDirectory() as folder:
        place = ungrouped(model, folder) if ungroup else model
        data = Recipe.load("fast").with_overrides(shared | {"data.evaluation_tokens": evaluation_tokens}).data
        draws = draw(opened(place).tokenizer, data)
        digests = [batch.digest[:12] for batch in (draws.calibration, draws.evaluation)]
        job = Job(place, replace(draws, search=draws.calibration))
        whole = row({"name": "dense"}, dense, job)
        if "failed" in whole:
            raise SystemExit(whole["failed"])
        for share in map(float, sparsity.split(",")):
            asked = {"sparsity": share}
            found = []
            for name, path in paths.items():
                if path is None:
                    continue
                told = {"name": name} | asked
                peer = row(told, theirs, replace(job, share=share), name, path)
                if "failed" in peer:
                    found.append((peer, None))
                    continue
                same = replace(job, share=1 - peer["blocks_whole"] / whole["blocks"])
                told = {"name": "fast", "beside": name} | asked
                found.append((peer, row(told, ours, same, shared, peer["seconds"])))
                if (method := PEERS[name].same) is not None:
                    told = {"name": "same", "beside": name} | asked
                    found.append((row(told, as_published, same, shared, method), None))
            told = {"name": "fast", "beside": None} | asked
            found.append((row(told, ours, replace(job, share=share), shared, None), None))
            show(share, found, whole, tokens)


def show(share: float, found: list[tuple[Row, Row | None]], whole: Row, tokens: int) -> None:
    """Print a table: a peer, and ours in its time."""
    threads = torch.get_num_threads()
    print(f"\nsparsity {share:g}; {tokens:,} tokens; dense {whole['perplexity']:.2f}; {threads} threads\n")
    columns = ["", "blocks kept", "parameters", "seconds", "perplexity"]
    columns += ["`fast` of that size, in that time: tokens", "seconds asked", "seconds", "perplexity"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for one, beside in found:
        title = PEERS[one["name"]].title if one["name"] in PEERS else "prunekit, `fast`"
        if one["name"] == "same":
            title = f"prunekit, {PEERS[one['beside']].title}'s method"
        cells = [title, *(cell(one, whole) if "failed" not in one else [f"did not run: {one['failed']}", "", "", ""])]
        if beside is None:
            cells += ["", "", "", ""]
        elif "failed" in beside:
            cells += [f"did not run: {beside['failed']}", "", "", ""]
        else:
            asked = f"{beside['asked']:.1f}" + ", the least" * (beside["asked"] > one["seconds"])
            cells += [f"{beside['tokens']:,}", asked, *cell(beside, whole)[2:]]
        print(f"| {' | '.join(cells)} |", flush=True)


def cell(row: Row, whole: Row) -> list[str]:
    """What is said of a result."""
    kept = f"{row['blocks'] / whole['blocks']:.1%}"
    if row["blocks_whole"] < row["blocks"]:
        kept += f", {row['blocks_whole'] / whole['blocks']:.1%} without zeros"
    return [kept, f"{row['parameters']:,}", f"{row['seconds']:.1f}", f"{row['perplexity']:.2f}"]


if __name__ == "__main__":
    typer.run(main)
