"""Single weights beside released code: what scores keep, what sweeps make of the rest, what changes places."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from released_tools import Rows, World, taken
from torch import Tensor, nn

from prunekit import LocalPruner
from prunekit.space.forms import WEIGHTS, Form, parse_form
from prunekit_strategies.finishers import dsnot, sparsellm
from prunekit_strategies.pruners.alps import ALPS
from prunekit_strategies.pruners.score import Wanda
from prunekit_strategies.pruners.sparsegpt import SparseGPT
from prunekit_strategies.pruners.weight_score import RIA, ZPruner

TWO_OF_FOUR = parse_form("2:4")


class Replayed(nn.Module):
    """The linear maps of a block under their names; called with the number of a window, each gets what it got then."""

    def __init__(self, world: World, block: int) -> None:
        super().__init__()
        self.windows, self.seen = world.windows, dict[nn.Module, Tensor]()
        for name, linear in world.maps.items():
            if not name.startswith(f"model.layers.{block}."):
                continue
            *_, kind, part = name.split(".")
            if not hasattr(self, kind):
                setattr(self, kind, nn.Module())
            beside = copy.deepcopy(linear)
            setattr(getattr(self, kind), part, beside)
            self.seen[beside] = world.inputs[name].float().unflatten(0, self.windows)

    def forward(self, number: Tensor, **_: Any) -> tuple[Tensor]:
        for linear, inputs in self.seen.items():
            linear(inputs[int(number.flatten()[0])][None])
        return (number,)


def replayed(world: World, blocks: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """A model of replayed blocks, and what the scripts of Wanda and its kin need around their pruning functions."""
    windows, seqlen = world.windows
    model = argparse.Namespace(
        model=argparse.Namespace(layers=[Replayed(world, block) for block in blocks]),
        config=argparse.Namespace(use_cache=False), hf_device_map={}, seqlen=seqlen,
    )  # fmt: skip
    numbers = torch.arange(windows).float().view(-1, 1, 1)
    around = {
        "get_loaders": lambda *_, **__: (None, None),
        "prepare_calibration_input": lambda *_, **__: (numbers.clone(), numbers.clone(), None, None),
        "transformers": transformers,
        "time": time,
    }
    return model, around


def weights_of(model: Any, blocks: tuple[int, ...]) -> dict[str, Tensor]:
    """By the names that maps have in the whole model."""
    layers = zip(blocks, model.model.layers, strict=True)
    return {
        f"model.layers.{block}.{name}": linear.weight.detach().clone()
        for block, layer in layers
        for name, linear in layer.named_modules()
        if isinstance(linear, nn.Linear)
    }


def masked(world: World, pruner: LocalPruner, share: float, form: Form, run: Callable[[Any, Any, int], None]) -> str:
    """What a released function and a pruner of ours keep, in blocks 0, 3 and 6."""
    blocks = (0, 3, 6)
    model, around = replayed(world, blocks)
    with contextlib.redirect_stdout(io.StringIO()):
        run(model, around, form.m // 2)
    theirs = weights_of(model, blocks)
    ours = dict[str, Tensor]()
    for name in theirs:
        layer = world.layer(name, form=form)
        (found,) = pruner.prune(layer, [layer.d_in - int(layer.d_in * share)])
        ours[name] = found.weight
    kept = sum(float((w != 0).sum()) for w in ours.values())
    other = sum(float(((w != 0) & (theirs[n] == 0)).sum()) for n, w in ours.items())
    fewer = kept - sum(float((w != 0).sum()) for w in theirs.values())
    both = f"{world.perplexity(theirs):.3f} and {world.perplexity(ours):.3f}"
    return f"{other:.0f} of {kept:,.0f} kept differ, its count less by {fewer:.0f}; perplexity {both}"


CPU = {".cuda()": "", "torch.cuda.synchronize()": "pass", "torch.cuda.empty_cache()": "pass"}


def scores(method: str, code: Path, world: World) -> Rows:
    """Wanda, RIA or Z-Pruner, each with the function of its script that prunes a whole model."""
    files = {"wanda": "prune_wanda", "ria": "prune_ria", "z-pruner": "z_pruner"}
    pruners: dict[str, LocalPruner] = {"wanda": Wanda(), "ria": RIA(), "z-pruner": ZPruner()}
    wrapper = taken(code / "lib/layerwrapper.py", "WrappedGPT", changes=CPU).WrappedGPT
    cases = [(0.5, WEIGHTS), (0.75, WEIGHTS)] + ([] if method == "z-pruner" else [(0.5, TWO_OF_FOUR)])
    for share, form in cases:
        options = argparse.Namespace(
            nsamples=world.windows[0], seed=0, seqlen=world.windows[1], sparsity_ratio=share, use_variant=False,
            model="llama", calib_dataset="", reconstruction=False, gptq=False, prune_method=method, a=0.5,
            reallocation=False, semi_sparse_acc=False, per_outneuron=False,
        )  # fmt: skip

        def run(model: Any, around: Any, n: int, options: Any = options) -> None:
            names = files[method], "find_layers"
            module = taken(code / "lib/prune.py", *names, changes=CPU, WrappedGPT=wrapper, **around)
            with torch.no_grad():
                getattr(module, files[method])(options, model, None, "cpu", n, 2 * n)

        yield (
            f"kept by blocks 0, 3 and 6, {f'{share:.0%} gone' if not form.m else '2:4'}",
            masked(world, pruners[method], share, form, run),
        )


def sparsegpt(world: World, code: Path) -> Rows:
    """Every map of three blocks."""
    released = taken(code / "sparsegpt.py", "SparseGPT", changes=CPU, transformers=transformers, time=time, DEBUG=False)
    for share, form in ((0.5, WEIGHTS), (0.75, WEIGHTS), (0.5, TWO_OF_FOUR)):
        theirs, ours, errors = dict[str, Tensor](), dict[str, Tensor](), list[float]()
        other = kept = 0.0
        for name, linear in world.maps.items():
            if int(name.split(".")[2]) not in (0, 3, 6):
                continue
            beside = copy.deepcopy(linear)
            code_ = released.SparseGPT(beside)
            for x in world.inputs[name].float().split(world.windows[1]):
                code_.add_batch(x[None], None)
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                code_.fasterprune(share, form.m // 2, form.m)
            layer = world.layer(name, form=form)
            (found,) = SparseGPT().prune(layer, [layer.d_in - int(layer.d_in * share)])
            theirs[name], ours[name] = beside.weight.detach(), found.weight
            errors.append(layer.error(ours[name]) / layer.error(theirs[name]))
            kept += float((found.weight != 0).sum())
            other += float(((found.weight != 0) & (theirs[name] == 0)).sum())
        both = f"{world.perplexity(theirs):.3f} and {world.perplexity(ours):.3f}"
        what = f"21 maps, {f'{share:.0%} gone' if not form.m else '2:4'}"
        yield (
            what,
            (
                f"{other / kept:.2%} of the kept are others; errors {min(errors):.4f} to {max(errors):.4f} of its; "
                f"perplexity {both}"
            ),
        )


def swaps(world: World, code: Path) -> Rows:
    """Attention of three blocks behind Wanda's masks: as released, and where its swaps may not change the sign."""
    wrapper = taken(code / "lib/layerwrapper.py", "WrappedGPT", changes=CPU).WrappedGPT
    blocks = (0, 3, 6)

    def released(share: float, form: Form, whole: bool) -> dict[str, Tensor]:
        """`whole`: all tokens as one window, whose variance is exact, and no swap that changes the error's sign."""
        model, around = replayed(world, blocks)
        if whole:
            for layer in model.model.layers:
                layer.seen = {linear: x.flatten(0, 1)[None] for linear, x in layer.seen.items()}
        options = argparse.Namespace(
            nsamples=1 if whole else world.windows[0], seed=0, initial_method="wanda", skip_layer="mlp",
            skip_sub_layer="no_skip", sparsity_ratio=share, without_DSnoT=False, pow_of_var_regrowing=1.0,
            max_cycle_time=50, update_threshold=0.1, without_same_sign=not whole, get_time_overhead=False,
        )  # fmt: skip
        names = "prune_DSnoT", "find_layers", "return_reorder_indice"
        module = taken(code / "lib/prune.py", *names, changes=CPU, WrappedGPT=wrapper, **around)
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            module.prune_DSnoT(options, model, None, "cpu", form.m // 2, form.m)
        return {name: w for name, w in weights_of(model, blocks).items() if "self_attn" in name}

    for share, form in ((0.5, WEIGHTS), (0.7, WEIGHTS), (0.5, TWO_OF_FOUR)):
        found = {"Wanda": dict[str, Tensor](), "its": released(share, form, whole=False), "ours": dict[str, Tensor]()}
        signed = released(share, form, whole=True)
        common = grown = 0
        for name, theirs in signed.items():
            layer, x = world.layer(name, form=form), world.inputs[name]
            (start,) = Wanda().prune(layer, [layer.d_in - int(layer.d_in * share)])
            old, dense, seen = start.weight.double(), layer.weight.double(), dsnot.Spread.of([x])
            most, _ = dsnot.swapped(old, dense, seen, 50, 1e-6, form.m)
            new, _ = dsnot.swapped(old, dense, seen, 50, dsnot.DSnoT().threshold, form.m)
            worse = dsnot.lost([x], dense - new) > dsnot.lost([x], dense - old)
            found["Wanda"][name], found["ours"][name] = start.weight, torch.where(worse[:, None], old, new).float()
            come = (theirs != 0) & (old == 0)
            common, grown = common + int((come & (most != 0)).sum()), grown + int(come.sum())
        what = f"attention of 3 blocks, {'2:4' if form.m else f'{share:.0%} gone'}"
        yield f"{what}: signs kept, exact variances", f"{common:,} of its {grown:,} swaps are ours"
        at_first = sum(_mean_error(world, name, w) for name, w in found["Wanda"].items())
        told = []
        for who, weights in found.items():
            left = sum(_mean_error(world, name, w) for name, w in weights.items()) / at_first
            told.append(f"{who} {left:.2f} and {world.perplexity(weights):.2f}")
        yield f"{what}: squared mean error and perplexity, as released", ", ".join(told)


def _mean_error(world: World, name: str, weight: Tensor) -> float:
    missing = world.maps[name].weight.detach().double() - weight.double()
    return float((missing @ world.inputs[name].mean(0)).square().sum())


class Lying:
    """A sub-layer of one chunk, whose inputs in the small model are those of the dense one."""

    def __init__(self, dense: Any, small: Any, x: Tensor) -> None:
        self.x, self.maps, self.dense_block, self.site = (
            x,
            [dense.gate_proj, dense.up_proj, dense.down_proj],
            None,
            None,
        )
        with torch.no_grad():
            self.hidden, self.out = F.silu(small.gate_proj(x)) * small.up_proj(x), dense(x)
        adapter = argparse.Namespace(maps=lambda *_: self.maps)
        self.twin = argparse.Namespace(piece=argparse.Namespace(adapter=adapter))

    def __len__(self) -> int:
        return 1

    def entering(self, _: int) -> Tensor:
        return self.x

    def wanted(self, _: int, __: str) -> Tensor:
        return self.out

    def inputs(self, _: int) -> Tensor:
        return self.hidden


def sparsellm_(world: World, code: Path) -> Rows:
    """The MLPs of three blocks, their inputs as in the dense model, float32 for its float16."""
    wide = {"torch.float16": "torch.float32", ".half()": ".float()"} | CPU
    pruner = taken(
        code / "pruning_utils.py", "SparseGPT_LlaMA", "find_layers", changes=wide, transformers=transformers, time=time,
        DEBUG=False,
    )  # fmt: skip
    released = taken(
        code / "model_utils.py", "llama_sparsellm", changes=wide, transformers=transformers,
        SparseGPT_LlaMA=pruner.SparseGPT_LlaMA, find_layers=pruner.find_layers,
    )  # fmt: skip
    blocks = (0, 4, 6)  # of the second it gives one round in the place of four
    for share in (0.5, 0.7, 0.9):
        layers: list[Any] = [Replayed(world, block) for block in blocks]

        class Model:
            config, seqlen = argparse.Namespace(use_cache=False, hidden_size=1), 1
            model = argparse.Namespace(layers=layers, embed_tokens=nn.Identity(), norm=nn.Identity())

            def parameters(self, weights: nn.Module = layers[0]) -> Any:
                return weights.parameters()

            def __call__(self, number: Tensor) -> Any:
                return self.model.layers[0](number, attention_mask=None)

        options = argparse.Namespace(
            nsamples=world.windows[0], true_sequential=False, minlayer=-1, maxlayer=1000, prune_only="", invert=False,
            wbits=16, sparsity=share, prunen=0, prunem=0, percdamp=0.01, blocksize=128,
        )  # fmt: skip
        batches = [(torch.full((1, 1), float(i)),) for i in range(options.nsamples)]
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            released.llama_sparsellm(Model(), batches, "cpu", options)
        told = list[str]()
        for block, layer in zip(blocks, layers, strict=True):
            path = f"model.layers.{block}.mlp"
            dense, small = world.model.get_submodule(path), copy.deepcopy(world.model.get_submodule(path))
            counts = dict[nn.Linear, Any]()
            for part in ("gate_proj", "up_proj", "down_proj"):
                problem = world.layer(f"{path}.{part}", form=WEIGHTS)
                keep = problem.d_in - int(problem.d_in * share)
                (found,) = SparseGPT().prune(problem, [keep])
                getattr(small, part).weight.copy_(found.weight)
                counts[getattr(small, part)] = argparse.Namespace(form=WEIGHTS, name=part), keep
            here = Lying(dense, small, world.inputs[f"{path}.up_proj"].float())
            mlp = sparsellm.MLP([small.gate_proj, small.up_proj], small.down_proj, nn.SiLU(), counts)
            with torch.no_grad():
                start, ours = sparsellm.SparseLLM()._alternated(mlp, here)  # type: ignore[arg-type]
                made = F.silu(layer.mlp.gate_proj(here.x)) * layer.mlp.up_proj(here.x)
                theirs = float((layer.mlp.down_proj(made) - here.out).square().sum() / here.out.square().sum())
            told.append(f"{start:.4f}, {theirs:.4f}, {ours:.4f}")
        yield f"error of MLPs 0, 4 and 6, {share:.0%} gone: SparseGPT, its, ours", "; ".join(told)


def admm(world: World, code: Path) -> Rows:
    """Three maps by its 20 rounds; SparseGPT and ALPS on the same."""
    released = taken(code / "lib/admm.py", "AdmmPruner", changes=CPU, transformers=transformers)
    for share in (0.5, 0.7, 0.9):
        told = list[str]()
        for name in ("0.self_attn.q_proj", "3.mlp.up_proj", "6.mlp.down_proj"):
            name = f"model.layers.{name}"  # noqa: PLW2901
            beside, layer = copy.deepcopy(world.maps[name]), world.layer(name, form=WEIGHTS)
            code_ = released.AdmmPruner(beside)
            code_.add_batch(world.inputs[name].float(), None)
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                code_.fasterprune(share)
            keep = layer.d_in - int(layer.d_in * share)
            errors = [layer.error(beside.weight.detach())]
            errors += [layer.error(pruner.prune(layer, [keep])[0].weight) for pruner in (SparseGPT(), ALPS())]
            told.append(", ".join(f"{error:.2e}" for error in errors))
        yield f"errors of three maps, {share:.0%} gone: its, `sparsegpt`, `alps`", "; ".join(told)


METHODS: dict[str, tuple[str, Callable[[World, Path], Rows]]] = {
    "wanda": ("wanda", lambda world, code: scores("wanda", code, world)),
    "ria": ("Relative-importance-and-activation-pruning", lambda world, code: scores("ria", code, world)),
    "z-pruner": ("Z-Pruner", lambda world, code: scores("z-pruner", code, world)),
    "sparsegpt": ("sparsegpt", sparsegpt),
    "dsnot": ("DSnoT", swaps),
    "sparsellm": ("SparseLLM", sparsellm_),
    "admm-pruning": ("admm-pruning", admm),
}
