"""Groups, depth and what searches read beside released code, on the same numbers."""

from __future__ import annotations

import abc
import argparse
import ast
import contextlib
import copy
import csv
import io
import os
import random
import runpy
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from released_tools import ATTENTION, MLP, Rows, World, taken
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from prunekit.calibration.fill import layer_problem
from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.statistics import statistics_of
from prunekit.calibration.stream import collect_stream
from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.allocator import Problem
from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation, Site
from prunekit.system.progress import Progress, Stage
from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import additive, convex_table
from prunekit_objectives.divergence import Divergence
from prunekit_strategies.allocators.evolution import Evolution
from prunekit_strategies.allocators.schedule import ratios, rising
from prunekit_strategies.finishers.reconstruction import TRIES, Reconstruction
from prunekit_strategies.pruners.gradient import LLMPruner
from prunekit_strategies.pruners.obs import OSSCAR, ZipLM
from prunekit_strategies.pruners.score import Channel, Minitron, Wanda
from prunekit_strategies.signals.influence import Influence
from prunekit_strategies.widths.minitron import Minitron as MinitronWidth

BLOCKS, SHARES = (0, 3, 6), (0.25, 0.5, 0.75)


def osscar(world: World, code: Path) -> Rows:
    """Neurons and KV groups of three blocks; its greedy pass, then its local search from there."""
    released = taken(code / "prune_algo.py", "OSSCAR_fastprune", "OSSCAR_local_search", np=np)

    def theirs(layer: Any, keep: int, update: int, swaps: int) -> Tensor:
        gram, n = layer.hessian.double(), layer.n_groups
        start, target = layer.weight.double().T.clone(), gram @ layer.weight.double().T
        with contextlib.redirect_stdout(io.StringIO()):
            found, _ = released.OSSCAR_fastprune(start, gram, target, n, keep, update)
            if swaps := min(swaps, keep - 1, n - keep):  # it cannot exchange all that is left
                found, _ = released.OSSCAR_local_search(found, gram, target, n, 30, swaps)
        return found.T

    for names, update, swaps in ((MLP, 10, 10), (ATTENTION, 2, 5)):
        errors, differ, kept_ = list[float](), 0, 0
        greedy = list[float]()
        for block in BLOCKS:
            layer = world.sub_layer(block, names)
            for share in SHARES:
                keep = layer.n_groups - round(layer.n_groups * share)
                (ours,) = OSSCAR().prune(layer, [keep])
                weight = theirs(layer, keep, update, swaps)
                kept = {*groups_of(weight, layer.group_size)}
                differ, kept_ = differ + len({*(ours.kept or ())} - kept), kept_ + keep
                errors.append(layer.error(ours.weight) / layer.error(weight))
                greedy.append(layer.error(ours.weight) / layer.error(theirs(layer, keep, update, 0)))
        what = "neurons of the MLPs" if names is MLP else "KV groups"
        yield (
            f"{what} of blocks 0, 3 and 6, 25, 50 and 75 % gone",
            (
                f"{differ} of {kept_:,} kept differ; errors {min(errors):.3f} to {max(errors):.3f} of its, "
                f"{min(greedy):.3f} to {max(greedy):.3f} of its greedy pass"
            ),
        )


def groups_of(weight: Tensor, size: int) -> list[int]:
    """Groups that have a weight."""
    return (weight != 0).any(0).unflatten(0, (-1, size)).any(1).nonzero().flatten().tolist()


def ziplm(world: World, code: Path) -> Rows:
    """The same by DarwinLM's copy of ZipLM's pass, which writes down the weights of every count."""
    linear_algebra = taken(code / "src/linalg_utils.py", "inv_sym")
    alone = argparse.Namespace(is_dist_available_and_initialized=lambda: False, is_main=lambda: True)
    shape = argparse.Namespace(get_number_of_rows_and_cols=lambda layer: tuple(layer.weight.shape))
    absent = type("Absent", (), {})
    released = taken(
        code / "src/fast_obc_struct.py", "FastOBCStruct", _ConvNd=absent, dist_utils=alone, model_utils=shape,
        linalg_utils=linear_algebra, List=list,
    )  # fmt: skip
    for names in (MLP, ATTENTION):
        differ = kept_ = 0
        errors = list[float]()
        for block in BLOCKS:
            layer = world.sub_layer(block, names)
            name = f"model.layers.{block}." + ("mlp.down_proj" if names is MLP else "self_attn.o_proj")
            code_ = released.FastOBCStruct(copy.deepcopy(world.maps[name]))
            code_.is_attn = names is ATTENTION
            for x in world.inputs[name].float().split(world.windows[1]):
                code_.update(x[None])
            gone = [round(layer.n_groups * share) for share in SHARES]
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                weights = code_.prune_struct([n * layer.group_size for n in gone], gone, layer.group_size)
            for n, weight, ours in zip(
                gone, weights, ZipLM().prune(layer, [layer.n_groups - n for n in gone]), strict=True
            ):
                kept = {*groups_of(weight.detach(), layer.group_size)}
                differ, kept_ = differ + len({*(ours.kept or ())} - kept), kept_ + layer.n_groups - n
                errors.append(layer.error(ours.weight) / layer.error(weight.detach()))
        what = "neurons of the MLPs" if names is MLP else "KV groups"
        yield (
            f"{what} of blocks 0, 3 and 6, 25, 50 and 75 % gone",
            (f"{differ} of {kept_:,} kept differ; errors {min(errors):.4f} to {max(errors):.4f} of its"),
        )


def shortgpt(world: World, code: Path) -> Rows:
    """Block influence of every block, and of every sub-layer by the same function."""
    released = taken(code / "shortgpt/metrics.py", "block_influence")
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for i, layer in enumerate(world.model.model.layers):
        points = {f"{i}.attention": layer.input_layernorm, f"{i}.mlp": layer.post_attention_layernorm}
        hooks += [
            norm.register_forward_pre_hook(lambda _, args, key=key: seen.setdefault(key, []).append(args[0]))
            for key, norm in points.items()
        ]
    hooks.append(
        world.model.model.norm.register_forward_pre_hook(lambda _, args: seen.setdefault("end", []).append(args[0]))
    )
    with torch.no_grad():
        for ids in world.tokens.ids:
            world.model(ids[None])
    for hook in hooks:
        hook.remove()
    stream = {key: torch.cat(parts) for key, parts in seen.items()}
    keys = list(stream)
    theirs = {key: float(released.block_influence(stream[key], stream[after]).mean()) for key, after in pairwise(keys)}
    signals = Influence(), Influence(since="block")
    adapter, ours = adapter_for("llama"), list[tuple[float, ...]]()
    asked = frozenset({"gram"}).union(*(signal.needs for signal in signals))
    flow, block = BlockFlow(world.model, adapter, world.tokens, dense=False), 0
    for site in adapter.sites(world.model):
        if site.block > block:
            flow.advance(block)
            block = site.block
        moments = flow.received(site, statistics_of(asked))
        layer = layer_problem(world.model, adapter, site, moments, asked, damping=1e-9)
        ours.append(tuple(signal.measure(layer) for signal in signals))
        flow.carry(site, adapter.linear(adapter.blocks(world.model)[site.block], site).weight)
    most = max(abs(alone - theirs[key]) for (alone, _), key in zip(ours, keys, strict=False))
    yield f"influence of {len(ours)} sub-layers", f"{most:.0e} at most"
    depth = len(world.model.model.layers)
    starts = [*(stream[f"{i}.attention"] for i in range(depth)), stream["end"]]
    whole = [float(released.block_influence(a, b).mean()) for a, b in pairwise(starts)]
    turned = [ours[2 * i + 1][1] for i in range(depth)]
    order = [sorted(range(depth), key=values.__getitem__) for values in (whole, turned)]
    most = max(abs(a - b) for a, b in zip(turned, whole, strict=True))
    yield f"influence of {depth} blocks, and their order", f"{most:.0e} at most; least first {order[0]} and {order[1]}"


def divergence(world: World, code: Path) -> Rows:
    """The dense model and three that lack single blocks, on four windows."""
    released = taken(code / "src/metrics.py", "compute_kl_div", changes={"torch.cuda.empty_cache()": "pass"},
                     trange=lambda *args, **_: range(*args))  # fmt: skip
    ids = world.tokens.ids[:4]
    with torch.no_grad():
        dense = world.model(ids).logits
    vocabulary = dense.shape[-1]
    rows = {top: list[float]() for top in (512, vocabulary)}
    bare = list[float]()
    for block in (0, 3, 6):
        model = copy.deepcopy(world.model)
        part = model.model.layers[block].mlp.down_proj.weight
        part.mul_(0.0)
        with torch.no_grad():
            logits = model(ids).logits
        theirs = released.compute_kl_div(model, list(ids[:, None]), list(dense[:, None]))
        given: Any = Given(dense[:, :-1], logits[:, :-1])
        count: Any = counted(ids)
        for top, found in rows.items():
            found.append(Divergence(top_k=top).loss(given, (), count) / theirs)
        bare.append(Divergence(top_k=512, rest=False).loss(given, (), count) / theirs)
    told = "; ".join(
        f"{'all' if top == vocabulary else top} {min(found):.6f} to {max(found):.6f}" for top, found in rows.items()
    )
    yield (
        f"divergence without one MLP, over its, by how many of {vocabulary:,} tokens are apart",
        (f"{told}; 512 and no rest {min(bare):.4f} to {max(bare):.4f}"),
    )


def counted(ids: Tensor) -> Any:
    return argparse.Namespace(n_tokens=ids.shape[0] * (ids.shape[1] - 1))


class Given:
    """Answers that are there."""

    def __init__(self, dense: Tensor, logits: Tensor) -> None:
        self.dense, self.own = dense, logits

    def dense_top(self, _: Any, k: int) -> Iterator[Any]:
        log_probs, ids = self.dense.log_softmax(-1).topk(k)
        yield argparse.Namespace(ids=ids, log_probs=log_probs)

    def logits(self, *_: Any) -> Iterator[tuple[None, Tensor]]:
        yield None, self.own


def atp(world: World, code: Path) -> Rows:
    """Its lines that make the shares of 8 and of 32 blocks, for steps up to the largest that it allows."""
    text = (code / "main.py").read_text()
    main: Any = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "main")
    names = {"mean_value", "step", "first_term", "sparsity_rates"}
    assigned: list[ast.stmt] = [node for node in main.body if isinstance(node, ast.Assign)]
    lines = [node for node in assigned if getattr(vars(node)["targets"][0], "id", "") in names]
    most = 0.0
    for depth in (8, 32):
        for mean in (0.3, 0.5, 0.7):
            largest = min(2 * mean, 2 * (1 - mean)) / (depth - 1)
            curve = ratios(rising("linear-increase", depth), [1] * depth, mean, 0.0, 1.0)
            for degree in (0.1, 0.5, 1.0):
                there = {"args": argparse.Namespace(beta=degree * largest, sparsity_ratio=mean), "length": depth}
                exec(compile(ast.Module(lines, []), "main", "exec"), there)
                rates: Any = there["sparsity_rates"]
                ours = [mean + degree * (share - mean) for share in curve]
                most = max(most, *(abs(a - b) for a, b in zip(ours, rates, strict=True)))
    yield "share that goes of every block, 8 and 32 blocks, 18 curves", f"{most:.0e} at most"


def activations(method: str, world: World, code: Path) -> Rows:
    """Scores of the neurons of all MLPs by its hooks, window by window."""
    names = "ForwardHook", "L2NormHook", "IndependentChannelContributionHook"
    file = code / "modelopt/torch/prune/importance_hooks/base_hooks.py"
    released = taken(file, *names, ABC=abc.ABC, abstractmethod=abc.abstractmethod)
    pruner = Minitron() if method == "minitron" else Channel()
    far, differ, kept = 0.0, 0, 0
    for block in range(len(world.model.model.layers)):
        name = f"model.layers.{block}.mlp.down_proj"
        linear, x = world.maps[name], world.inputs[name].unflatten(0, world.windows)
        if method == "minitron":
            hook = released.L2NormHook()
            hook(linear, (x.float().transpose(0, 1),), None)  # the sequence first
        else:
            hook = released.IndependentChannelContributionHook(linear)
            for window in x.float():
                hook(linear, (window[None],), None)
        theirs = hook.accumulate().detach().double()
        size = x.abs().mean(1).square().mean(0).sqrt()
        ours = pruner.scores(world.layer(name, statistics={"absolute": size}))
        assert ours is not None
        scaled = theirs * (ours @ theirs) / (theirs @ theirs)
        far = max(far, float((ours - scaled).norm() / ours.norm()))
        for share in SHARES:
            keep = round(len(ours) * (1 - share))
            best = [{*scores.argsort(descending=True, stable=True)[:keep].tolist()} for scores in (ours, theirs)]
            differ, kept = differ + len(best[0] - best[1]), kept + keep
    yield (
        "scores of the neurons of 8 MLPs, kept at 25, 50 and 75 % gone",
        (f"‖·‖ {far:.0e} but for a factor; {differ} of {kept:,} kept differ"),
    )


def channels(world: World, code: Path) -> Rows:
    """Scores of the channels of the residual stream, by hooks on its norms, window by window."""

    class Layer(nn.Module):
        """A block as there, its norms apart from the maps behind them."""

        def __init__(self, block: Any) -> None:
            super().__init__()
            self.self_attention, self.mlp = Attention(), Experts()
            self.input_layernorm, self.pre_mlp_layernorm = block.input_layernorm, block.post_attention_layernorm

    attention, experts, other = (type(name, (nn.Module,), {}) for name in ("Attention", "Experts", "Other"))
    Attention, Experts = partial(made, attention, _has_fused_input_layernorm=False), partial(made, experts)
    released = taken(
        code / "modelopt/torch/prune/plugins/mcore_minitron.py", "_register_hidden_size_importance", partial=partial,
        changes={"torch.distributed.all_reduce(": "(lambda *_, **__: None)("}, _DynamicTransformerLayer=Layer,
        _DynamicAttention=attention, _DynamicMoELayer=experts, _DynamicMLP=other, _DynamicMambaLayer=other,
        _fused_ln_linears_over_hidden_size=lambda _: [], gather_from_tensor_model_parallel_region=lambda x: x,
    )  # fmt: skip
    hooks, asked = list[Any](), list[Callable[[], Tensor]]()

    def register(norm: nn.Module, hook: Callable[..., Any], **_: str) -> None:
        hooks.append(norm.register_forward_hook(lambda m, args, out: hook(m, args, out.transpose(0, 1))))

    registry = argparse.Namespace(register_hook=register, register_importance=lambda *args: asked.append(args[2]))
    module = argparse.Namespace(decoder=argparse.Namespace(layers=[Layer(b) for b in world.model.model.layers]))
    module._register_temp_attribute = partial(setattr, module)
    released._register_hidden_size_importance(module, registry)
    with torch.no_grad():
        for ids in world.tokens.ids:
            world.model(ids[None])
    for hook in hooks:
        hook.remove()
    with tempfile.TemporaryDirectory() as folder:
        adapter: Any = adapter_for("llama")
        stream = collect_stream(world.model, adapter, world.tokens, Path(folder), Progress(), gram=False)
    ours, (theirs,) = MinitronWidth().directions(stream), (ask() for ask in asked)
    order = theirs.argsort(descending=True, stable=True)
    yield f"order of the {len(ours)} channels of the residual stream", f"{int((ours != order).sum())} places differ"


def made(kind: type[nn.Module], **fields: Any) -> nn.Module:
    module = kind()
    for name, value in fields.items():
        setattr(module, name, value)
    return module


def shortened_llama(world: World, code: Path) -> Rows:
    """Taylor+ of every block, by its script from beginning to end."""
    model = copy.deepcopy(world.model).requires_grad_(True)
    data, tools = types.ModuleType("dataset"), types.ModuleType("utils")
    vars(data).update(get_examples=lambda *_, **__: world.tokens.ids)
    vars(tools).update(get_model=lambda *_, **__: (model, None, ""), set_seed=lambda _: None)
    there, argv = {"dataset": data, "utils": tools}, sys.argv
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sys.argv, before = ["script", "--output_dir", folder], {name: sys.modules.get(name) for name in there}
        sys.modules |= there
        try:
            runpy.run_path(str(code / "src/anal_block_sensitivity_taylor.py"), run_name="__main__")
        finally:
            sys.argv = argv
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
        text = {name: Path(folder, f"{name}.csv").read_text().splitlines() for name in ("weight_score", "block_order")}
        found = {name: float(score) for name, score in list(csv.reader(text["weight_score"]))[1:]}
        order = [int(i) for i in text["block_order"][0].split(",")]
    model.zero_grad()
    ids = world.tokens.ids
    model(ids, labels=ids).loss.backward()
    maps, worth = {name: model.get_submodule(name).weight for name in world.maps}, list[float]()
    parts = [[(k, v) for k, v in found.items() if f".layers.{block}." in k] for block in range(len(order))]
    theirs = [sum(v for k, v in part if "proj" in k) for part in parts]
    norms = [sum(v for k, v in part if "norm" in k) for part in parts]
    for block in range(len(order)):
        total = 0.0
        for names in (MLP, ATTENTION):
            layer = world.sub_layer(block, names)
            path = {name.rsplit(".", 1)[-1]: w for name, w in maps.items() if f".layers.{block}." in name}
            first, *front = [{"gradient": path[name].grad.double()} for name in names]
            producers = tuple(
                replace(each, statistics=known) for each, known in zip(layer.producers, front, strict=True)
            )
            scores = LLMPruner().scores(replace(layer, statistics=first, producers=producers))
            total += float(scores.sum())
        worth.append(total)
    far = max(abs(a - b) / b for a, b in zip(worth, theirs, strict=True))
    more = max(a / b for a, b in zip(norms, theirs, strict=True))
    same = order == sorted(range(len(worth)), key=worth.__getitem__)
    yield (
        "Taylor+ of 8 blocks by its script, and the order in which they go",
        (f"{far:.0e} at most, relative, without the norms, which add {more:.1%} at most; same order: {same}"),
    )


STAGES = ((4, 2_048), (2, 16_384), (1, 65_536))  # survivors, tokens


def evopress(world: World, code: Path) -> Rows:
    """Its search from beginning to end on sums of 16 convex tables, 50 of them, every level of 16 removed groups."""
    sites, generations = tuple(Site(f"{i:02}", i, "mlp", 16, 1, 1) for i in range(16)), 30
    left, spent = dict[str, list[float]](), dict[str, list[int]]()
    for seed in range(50):
        space = Space.whole(sites, Budget(128))
        problem = Problem(space, convex_table(space, seed), space.uniform(), seed, STAGES[-1][1])
        loss, (_, lowest) = additive(problem.errors, space), best_allocation(space, problem.errors)
        found = {"its": evolved(code, problem, generations, loss)}
        for who, screen in (("ours", 1), ("ours, `filter: 8`", 8)):
            talk = converse(Evolution(generations, 16, 3, STAGES, generations, "none", screen), problem)
            asked = {query for ask in talk.asks for query in ask}  # none is paid for twice
            found[who] = talk.answer, sum(query.tokens or 0 for query in asked)
        for who, (answer, tokens) in found.items():
            gap = (loss(answer) - lowest) / (loss(problem.start) - lowest)
            left.setdefault(who, []).append(gap)
            spent.setdefault(who, []).append(tokens)
    told = [f"{who} {sorted(gaps)[25]:.1%} for {sorted(spent[who])[25] / 1e6:.1f} M" for who, gaps in left.items()]
    what = "left of what uniform is above the optimum, 30 generations of 16, token-forwards; medians"
    yield what, ", ".join(told)


def evolved(
    code: Path, problem: Problem, generations: int, loss: Callable[[Allocation], float]
) -> tuple[Allocation, int]:
    """The answer of its script, and how many tokens it has asked about; level 0 is the start."""
    names, middle, seqlen, tokens = [site.name for site in problem.space.sites], problem.start[0], 2_048, 0

    def fitness(model: Any, data: list[Tensor], *_: Any) -> float:
        nonlocal tokens
        tokens += sum(each.shape[1] for each in data)
        return loss(tuple(middle - level for level in model.state))

    def exists(file: str) -> bool:
        return abs(int(Path(file).stem)) <= middle

    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(
            seed=problem.seed, log_wandb=False, dtype="auto", model_name_or_path="", memory_efficient=True,
            attn_implementation=None, tokenizer_name="", use_fast_tokenizer=False, calibration_data="",
            calibration_sequence_length=seqlen, calibration_tokens=STAGES[-1][1], eval_sequence_length=1,
            eval_datasets=[], eval_tokens=0, fitness_fn="ppl", sparse_weights_path=folder, generations=generations,
            eval_every=1, offspring=16, max_level=middle, max_total_deviation=99_999, configuration_name="found",
            survivors_per_selection=[s for s, _ in STAGES], tokens_per_selection=[t for _, t in STAGES],
        )  # fmt: skip
        model = argparse.Namespace(config=argparse.Namespace(max_position_embeddings=1), state=None)
        stub = argparse.Namespace(from_pretrained=lambda *_, **__: model)
        path = argparse.Namespace(isdir=lambda _: True, join=os.path.join, exists=exists)
        released = taken(
            code / "evo_prune_search.py", "main", "selection", np=np, copy=copy, random=random, has_wandb=False,
            os=argparse.Namespace(listdir=lambda _: names, path=path), parse_args=lambda: options, List=list,
            fix_seed=random.seed, AutoModelForCausalLM=stub, AutoTokenizer=stub, trange=range, Optional=typing.Optional,
            get_data=lambda *_, **__: [torch.zeros(1, seqlen)] * (STAGES[-1][1] // seqlen),
            compute_perplexity=lambda *_: 1.0, compute_fitness=fitness,
            load_layers=lambda model, _, state, __: setattr(model, "state", state),
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            released.main()
        lines = Path(folder, "found").read_text().splitlines()
    return tuple(middle - int(line.split(": ")[1]) for line in lines), tokens


def squared(parts: list[Tensor], wanted: list[Tensor], weight: float, mlp: Any, i: int) -> Tensor:
    """Of one window."""
    return weight * (mlp(parts[i]) - wanted[i]).square().sum()


@torch.no_grad()
def relative(x: Tensor, wanted: Tensor, mlp: Any) -> float:
    return float((mlp(x) - wanted).square().sum() / wanted.square().sum())


def reconstruction(world: World, code: Path) -> Rows:
    """Half of three MLPs trained on 7 windows, 28 steps at four rates; error on the eighth."""
    nothing = argparse.Namespace(select_peft_layers=lambda **_: None, at_train_end=lambda **_: None)
    tools = argparse.Namespace(
        get_percentage_of_trainable_parameters=lambda _: 100.0, get_layers_of_modules=lambda _: {"mlp": None}
    )
    released = taken(
        code / "prune_methods.py", "PruneMethod", peft_methods=argparse.Namespace(FullFT=lambda **_: nothing),
        AdamW=torch.optim.AdamW, SGD=torch.optim.SGD, AttnWrapper=(), MLPWrapper=(), SelectiveMethods=None, Utils=tools,
        get_linear_schedule_with_warmup=get_linear_schedule_with_warmup, tqdm=lambda steps: steps,
    )  # fmt: skip
    learning, stage = range(world.windows[0] - 1), Stage()
    forgotten: Any = argparse.Namespace(load=lambda _: None, save=lambda *_: None)
    for block in BLOCKS:
        path = f"model.layers.{block}.mlp"
        dense, x = world.model.get_submodule(path), world.inputs[f"{path}.up_proj"].float()
        parts = [part[None] for part in x.split(world.windows[1])]
        kept = torch.tensor(sorted(Wanda().ranking(world.sub_layer(block, MLP))[: dense.up_proj.out_features // 2]))
        start = copy.deepcopy(dense).requires_grad_(False)
        for linear in (start.gate_proj, start.up_proj):
            linear.weight = nn.Parameter(linear.weight[kept])
        start.down_proj.weight = nn.Parameter(start.down_proj.weight[:, kept].contiguous())
        with torch.no_grad():
            wanted = [dense(part) for part in parts]
        power = sum(float(wanted[i].square().sum()) for i in learning)
        error = partial(squared, parts, wanted, len(learning) / power)

        judged = partial(relative, parts[-1], wanted[-1])
        told = [f"{judged(start):.3f} before"]
        for rate in (1e-4, 1e-3, 3e-3, 1e-2):
            mlp = copy.deepcopy(start).requires_grad_(True)
            options = argparse.Namespace(
                initial_lr=rate, n_iterations=4 * len(learning), constant_layer_norm=False, optim=None, loss_fn="mse",
                log_train_loss=False, log_grad_norm=False, gradient_accumulation_steps=1, mask_pad_tokens=False,
            )  # fmt: skip
            runner = argparse.Namespace(config=argparse.Namespace(peft_strategy="FullFT"))
            holder = argparse.Namespace(args=options, model=mlp, runner=runner)
            given = [parts[i] for i in learning], [wanted[i] for i in learning]
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # no CUDA
                released.PruneMethod.reconstruct_weights(
                    holder, mlp, *given, "cpu", None, None, None, block, 8, loss_mask=[None] * len(learning)
                )
            theirs = judged(mlp)
            mlp = copy.deepcopy(start).requires_grad_(True)
            Reconstruction(rate=rate, epochs=4).fit(
                list(mlp.parameters()), partial(error, mlp), len(learning),
                partial(judged, mlp), seed=0, checkpoints=forgotten, name="mlp", stage=stage, tries=TRIES,
            )  # fmt: skip
            told.append(f"{theirs:.3f} and {judged(mlp):.3f} at {rate:g}")
        yield f"held-out error of MLP {block}, half of its neurons: its, ours", ", ".join(told)


METHODS: dict[str, tuple[str, Callable[[World, Path], Rows]]] = {
    "osscar": ("OSSCAR", osscar),
    "ziplm": ("DarwinLM", ziplm),
    "influence": ("ShortGPT", shortgpt),
    "divergence": ("EvoPress", divergence),
    "evopress": ("EvoPress", evopress),
    "reconstruction": ("Free-Lunch-in-LLM-Compression", reconstruction),
    "atp": ("ATP", atp),
    "minitron": ("Model-Optimizer", lambda world, code: activations("minitron", world, code)),
    "minitron-width": ("Model-Optimizer", channels),
    "channel": ("Model-Optimizer", lambda world, code: activations("channel", world, code)),
    "shortened-llama": ("shortened-llm", shortened_llama),
}
