"""The core of our methods beside that of their released code, on the same tensors: what differs.

    python benchmarks/released.py MODEL --released FOLDER --dataset wikitext2-valid.txt --evaluation wikitext2-test.txt

FOLDER holds clones under the names of their repositories. Of each the functions that decide are run as they are, in
memory, with the CPU for CUDA; what stands around them, such as trainers and loaders, is not imported. Rows are printed
as they come, in Markdown; `--only alps,reap` makes some of them. GISP's function stands inside another and is not run:
its sums are written down here after its Algorithm 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import released_groups
import released_learners
import released_weights
import torch
import torch.nn.functional as F
import transformers
import typer
from released_tools import ATTENTION, MLP, Rows, World, apart, corr, shares, taken
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import LlamaForCausalLM

from prunekit import LayerProblem, ResidualStream, best_weights
from prunekit.calibration.fill import layer_problem
from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.statistics import statistics_of
from prunekit.data.draws import draw
from prunekit.layer.knapsack import Knapsack
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import opened
from prunekit.plugins.learner import GateQuery, Training
from prunekit.recipe.schema import Recipe
from prunekit.search.gated import GatedModel
from prunekit.space.forms import RANKS, WEIGHTS
from prunekit.testing import toy_tokens
from prunekit.testing.learners import space_of
from prunekit.testing.models import tiny
from prunekit_strategies.finishers.elsa import Elsa, Map
from prunekit_strategies.finishers.linear_patch import Pairs
from prunekit_strategies.learners import bypass_bp, ddp, hard_concrete, lora_prune
from prunekit_strategies.pruners.alps import ALPS, alternate
from prunekit_strategies.pruners.asvd import ASVD, MeanAbsolute
from prunekit_strategies.pruners.expert_frequency import ExpertFrequency
from prunekit_strategies.pruners.olica import Olica
from prunekit_strategies.pruners.reap import REAP
from prunekit_strategies.pruners.svd_llm import SVDLLM
from prunekit_strategies.signals.outliers import Outliers
from prunekit_strategies.signals.tail_exponent import spectrum, tail_exponent
from prunekit_strategies.widths.slicegpt import SliceGPT


def svd_llm(world: World, code: Path) -> Rows:
    """Every map of the model, by its scripts' two functions."""

    class Factors(nn.Module):
        """Takes the factors that the code makes."""

        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                for side in ("u", "v"):
                    setattr(self, f"{name}_{side}_proj", nn.Linear(1, 1, bias=False))

    def find(module: nn.Module) -> dict[str, nn.Linear]:
        return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}

    released = taken(
        code / "SVDLLM.py", "profle_svdllm", "whitening",
        tqdm=lambda x, **_: x, find_layers=find, SVD_LlamaAttention=Factors, SVD_LlamaMLP=Factors,
    )  # fmt: skip
    for share in (0.8, 0.5):
        model = copy.deepcopy(world.model)
        for layer in model.model.layers:
            layer.hidden_size = model.config.hidden_size
        with contextlib.redirect_stdout(io.StringIO()):
            seen = released.profle_svdllm("llama", model, [{"input_ids": ids[None]} for ids in world.tokens.ids], "cpu")
            released.whitening("llama", model, seen, share, "cpu")
        theirs, ours, ranks = dict[str, Tensor](), dict[str, Tensor](), True
        for name, linear in world.maps.items():
            block = model.model.layers[int(name.split(".")[2])]
            kind, part = name.split(".")[3], name.rsplit(".", 1)[-1].removesuffix("_proj")
            u, v = (getattr(getattr(block, kind), f"{part}_{side}_proj").weight.detach().double() for side in "uv")
            theirs[name] = u @ v
            (found,) = SVDLLM().prune(world.layer(name, form=RANKS, damping=0.0), [u.shape[1]])
            ours[name] = found.weight
            ranks &= u.shape[1] == int(linear.weight.numel() * share / sum(linear.weight.shape))
        worst = max(apart(ours[n], theirs[n]) for n in theirs)
        both = f"{world.perplexity(theirs):.4f} and {world.perplexity(ours):.4f}"
        yield f"products at {share:.0%} of the parameters", f"‖·‖ {worst:.1e}, ranks equal: {ranks}, perplexity {both}"


def asvd(world: World, code: Path) -> Rows:
    """Every map, with its randomised decomposition and with an exact one in its place."""
    released = taken(code / "modules" / "svd_linear.py", "SVDLinear", np=np)
    drawn = torch.svd_lowrank

    def exact(w: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return u[:, :q], s[:q], v[:q].T

    for share in (0.8, 0.5):
        torch.manual_seed(0)
        theirs, ours, plain, more = dict[str, Tensor](), dict[str, Tensor](), list[float](), list[float]()
        for name, linear in world.maps.items():
            x, beside = world.inputs[name], copy.deepcopy(linear)
            size = x.abs().mean(0)
            beside.scaling_diag_matrix = size.float() * len(world.tokens)  # type: ignore[assignment]  a sum of means

            def product(linear: nn.Linear = beside, share: float = share) -> tuple[Tensor, int]:
                made = released.SVDLinear.from_linear(linear, share, act_aware=True, alpha=0.5)
                factors = made.ALinear.weight.detach().double(), made.BLinear.weight.detach().double()
                return factors[0] @ factors[1], made.truncation_rank

            theirs[name], rank = product()
            layer = world.layer(name, form=RANKS, statistics={MeanAbsolute().name: size})
            (found,) = ASVD().prune(layer, [rank])
            ours[name] = found.weight.double()
            torch.svd_lowrank = exact  # type: ignore[assignment]
            plain.append(apart(ours[name], product()[0]))
            torch.svd_lowrank = drawn
            w, scale = linear.weight.detach().double(), size.sqrt()
            more.append(float(((w - theirs[name]) * scale).norm() / ((w - ours[name]) * scale).norm()))
        both = f"{world.perplexity(theirs):.2f} and {world.perplexity(ours):.2f}"
        worst = max(apart(ours[n], theirs[n]) for n in theirs)
        yield (
            f"products at {share:.0%} of the parameters",
            f"‖·‖ {worst:.2f}, with an exact decomposition in its place {max(plain):.1e}; its scaled error is "
            f"{min(more):.3f} to {max(more):.3f} times ours; perplexity {both}",
        )


def reap(world: World, code: Path) -> Rows:
    """Tiny models of experts, two batches."""
    metrics = taken(code / "src/reap/metrics.py", "OnlineStatsTracker")
    there = {"OnlineStatsTracker": metrics.OnlineStatsTracker, "dataclass": dataclass, "Optional": typing.Optional}
    names = "PreparedPruningBatch", "initialize_pruning_state", "_prepare_pruning_batch", "update_pruning_state"
    released = taken(code / "src/reap/pruning_metrics.py", *names, Any=Any, **there)
    tokens, pruner = toy_tokens(windows=16, seqlen=8), REAP()
    asked = frozenset({"gram", *pruner.needs, *ExpertFrequency().needs})
    for family, renormalised in (("mixtral", True), ("qwen3_moe", True), ("olmoe", False), ("qwen2_moe", False)):
        model, adapter = tiny(family, num_hidden_layers=2).requires_grad_(False), adapter_for(family)
        site = next(site for site in adapter.sites(model) if site.kind == "experts")
        inside: Any = adapter.experts  # type: ignore[attr-defined]
        experts, router = (adapter.blocks(model)[site.block].get_submodule(p) for p in (inside.path, inside.router))
        seen: list[tuple[Tensor, ...]] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...], into: list[tuple[Tensor, ...]] = seen) -> None:
            into.append(args)

        with experts.register_forward_pre_hook(catch):
            model(tokens.ids)
        (hidden, ids, _), n = seen[0], site.n_groups
        once = torch.ones(len(hidden), 1, dtype=hidden.dtype)
        made = torch.stack([experts(hidden, torch.full((len(hidden), 1), e), once) for e in range(n)])
        logits, state = F.linear(hidden, router.get_parameter("weight")), released.initialize_pruning_state(n)
        for part in (slice(0, len(hidden) // 2), slice(len(hidden) // 2, None)):
            released.update_pruning_state(
                state, activations=made[:, part], selected_experts=ids[part], router_logits=logits[part], num_experts=n,
                renormalize_router_weights=renormalised,
            )  # fmt: skip
        moments = BlockFlow(model, adapter, tokens, dense=False).received(site, statistics_of(asked))
        layer = layer_problem(model, adapter, site, moments, asked, damping=1e-9)
        ours, shares_ = pruner.scores(layer), ExpertFrequency().scores(layer)
        theirs, chosen_ = state["reap"].mean.double(), state["expert_frequency"].double()
        same = theirs.argsort().tolist() == ours.argsort().tolist()
        most = float((theirs - ours).abs().max() / ours.max())
        how = "with" if renormalised else "without"
        often = float((chosen_ / chosen_.sum() - shares_ / shares_.sum()).abs().max())
        yield f"scores of {n} experts, {family}, {how} its option", f"{most:.1e} of the largest, same order: {same}"
        yield f"how often {n} experts are selected, {family}", f"{often:.0e} at most, as shares"


def olica(world: World, code: Path) -> Rows:
    """Kept neurons, and the map beside the MLP of three blocks."""
    cpu = {".cuda()": "", "@autocast(device_type='cuda')": ""}
    tools = taken(code / "utils/utils.py", "WrappedGPT", "solve", changes=cpu)
    released = taken(code / "utils/llama_utils.py", "thinner_mlp", changes=cpu, Parameter=nn.Parameter)
    windows, seqlen = world.windows
    differ = neurons = 0
    ridge, patches, spread = list[float](), list[float](), list[float]()
    for block in (0, 3, 6):
        path, wrapped = f"model.layers.{block}.mlp", dict[str, Any]()
        for name in MLP:
            wrapped[f"mlp.{name}"] = tools.WrappedGPT(world.maps[f"{path}.{name}"])
            for x in world.inputs[f"{path}.{name}"].float().split(seqlen):
                wrapped[f"mlp.{name}"].add_batch(x[None], world.maps[f"{path}.{name}"](x[None]).detach())
        order = Olica().ranking(world.sub_layer(block, MLP))
        mlp = world.model.get_submodule(path)
        rows = mlp.up_proj.weight.detach()
        small: Any = None
        for share in (0.25, 0.5):
            small = released.thinner_mlp(copy.deepcopy(mlp), wrapped, world.model.config.hidden_size, share)
            kept = {int((rows == row).all(1).nonzero()[0, 0]) for row in small.up_proj.weight.detach()}
            differ, neurons = differ + len(kept - {*order[: len(kept)]}), neurons + len(kept)
        x = world.inputs[f"{path}.up_proj"].float()
        with torch.no_grad():
            missing = mlp(x) - small(x)
        options = argparse.Namespace(percdamp=0.5, num_samples=windows, seqlen=seqlen)
        solution, _, found = tools.solve(x, missing, options)
        # what its `pruning` does with the solution
        together = ((found - found.mean(0)) * (missing - missing.mean(0))).mean(0)
        rho = together / (found.std(0) * missing.std(0))
        weight = torch.sigmoid((rho - rho.mean()) / 0.05)
        u, s, v = torch.linalg.svd(solution * weight)
        rank = int(0.03 * len(s))
        theirs = ((u[:, :rank] * s[:rank]) @ (v[:rank] / weight)).T
        pairs = Pairs.over([(x.double(), missing.double(), 1.0)])
        left, right = pairs.factors(0.5, rank, "released")
        best, other = pairs.factors(0.5, rank, "optimal")
        ridge.append(apart(pairs.ridge(0.5), solution.T))
        patches.append(apart(left @ right, theirs))
        spread.append(pairs.error(best @ other) / pairs.error(theirs.double()))
    yield "kept neurons of 3 MLPs at 25 and 50 %", f"{differ} of {neurons} differ"
    yield "ridge regressions, maps of rank 7", f"‖·‖ {max(ridge):.1e}, {max(patches):.1e}"
    yield "error with `truncate: optimal`, over its map", f"{min(spread):.4f} to {max(spread):.4f} times"


def owl(world: World, code: Path) -> Rows:
    """D of every block, and what it makes of 50 %."""
    released = taken(code / "lib/prune_all.py", "check_outlier_mean")
    tools = taken(code / "lib/layerwrapper.py", "WrappedGPT")
    theirs, groups, maps = list[float](), list[float](), list[float]()
    for block in range(len(world.model.model.layers)):
        scores, each = list[Tensor](), list[tuple[float, int]]()
        for name, linear in world.maps.items():
            if f".layers.{block}." not in name:
                continue
            seen = tools.WrappedGPT(linear)
            for x in world.inputs[name].float().split(world.tokens.seqlen):
                seen.add_batch(x[None], None)
            scores.append((linear.weight.detach().abs() * seen.scaler_row.sqrt()).flatten())
            each.append((Outliers().measure(world.layer(name)), linear.weight.numel()))
        theirs.append(released.check_outlier_mean(torch.cat(scores), 5) / 100)
        parts = [
            (Outliers().measure(layer := world.sub_layer(block, names)), sized(layer)) for names in (ATTENTION, MLP)
        ]
        groups.append(mean(parts))
        maps.append(mean(each))

    def kept(values: list[float]) -> Tensor:
        d = torch.tensor(values, dtype=torch.float64)
        share = (d - d.min()) / (d.max() - d.min()) * 0.16
        return share - share.mean() + 0.5

    for name, ours in (("groups", groups), ("weights", maps)):
        most = float((kept(ours) - kept(theirs)).abs().max())
        yield (
            f"share kept of every block at 50 %, {name}",
            f"{most:.2%} at most, correlation of D {corr(theirs, ours):.3f}",
        )


def alpha_pruning(world: World, code: Path) -> Rows:
    """Exponents of every map, and shares of blocks at 50 %."""
    released = taken(code / "lib/esd_utils.py", "net_esd_estimator", np=np)
    with contextlib.redirect_stdout(io.StringIO()):
        found = released.net_esd_estimator(world.model.model.layers, fix_fingers="xmin_peak")
    spectra = [spectrum(world.maps[f"model.layers.{name}"].weight.detach()) for name in found["longname"]]
    theirs, ours = found["alpha"], [tail_exponent(values) for values in spectra]
    most = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    yield f"exponents of {len(ours)} maps", f"{most:.2f} at most, correlation {corr(theirs, ours):.3f}"
    read = [as_read(values) for values in spectra]
    most = max(abs(a - b) for a, b in zip(theirs, read, strict=True))
    yield "the same, its window, its 100 bins and one side of (2) in ours", f"{most:.1e} at most"


def as_read(values: Tensor, bins: int = 100) -> float:
    """The tail exponent as the code has it: no lower end, 1.5 times the lower end of the bin above, one side of (2)."""
    logs, n = values.log(), len(values)
    low, width = float(logs[0]), float(logs[-1] - logs[0]) / bins
    counts = torch.bincount(((logs - low) / width).long().clamp_max(bins - 1), minlength=bins).tolist()
    end = low + counts.index(max(counts)) * width + math.log(1.5)
    found = []
    for k in (logs <= end)[:-1].nonzero().flatten().tolist():
        tail = logs[k:] - logs[k]
        alpha = 1 + (n - k) / float(tail.sum())
        steps = torch.arange(n - k, dtype=torch.float64) / (n - k)
        found.append((float((1 - torch.exp((1 - alpha) * tail) - steps).abs().max()), alpha))
    return min(found)[1]


def alps(world: World, code: Path) -> Rows:
    """128 rows of two maps at 50, 70 and 90 %."""
    cpu = {"'cuda:0'": "'cpu'", "torch.cuda.synchronize()": "pass"}
    released = taken(
        code / "alps.py", "ALPS_prune", changes=cpu, np=np, transformers=transformers, dev="cpu", time=_Still
    )
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.4.mlp.up_proj"):
        weight, x = world.maps[name].weight.detach()[:128].clone(), world.inputs[name].float()
        for keep in (x.shape[1] // 2, round(0.3 * x.shape[1]), round(0.1 * x.shape[1])):
            linear = nn.Linear(*reversed(weight.shape), bias=False).requires_grad_(False)
            linear.weight.copy_(weight)
            code_ = released.ALPS_prune(linear, *world.windows)
            code_.add_batch(x[None], linear(x)[None])
            code_.ALPS_admm(1 - keep / x.shape[1])
            layer = world.layer(name, weight=weight, form=WEIGHTS)
            (ours,) = ALPS(rule="released").prune(layer, [keep])
            (grown,) = ALPS().prune(layer, [keep])
            kept = ours.weight != 0
            errors = ", ".join(f"{layer.error(w):.3e}" for w in (linear.weight, ours.weight, grown.weight))
            other = shares((kept & (linear.weight == 0)).sum(), float(kept.sum()))
            rounded = shares((kept & ~chosen(layer, keep)).sum(), float(kept.sum()))
            what = f"{name.split('.', 2)[2]}, {keep} of {x.shape[1]}: its weights, ours in float64; errors"
            yield what, f"{other}, {rounded} are others; {errors}"


def chosen(layer: LayerProblem, keep: int) -> Tensor:
    """What ours keeps under the released rule where nothing is rounded to float32."""
    scale = layer.hessian.diagonal().sqrt()
    gram = layer.hessian / scale / scale[:, None]
    *_, mask = alternate(
        layer.target * scale, gram, torch.linalg.eigh(gram), lambda x: best_weights(x.abs(), [keep], "layer")[0],
        0.1, 300, "released",
    )  # fmt: skip
    return mask


class _Still:
    """A clock that stands."""

    @staticmethod
    def time() -> float:
        return 0.0

    perf_counter = time


def elsa(world: World, code: Path) -> Rows:
    """32 steps of Adam down a quadratic, projected as often and as early as there."""
    package = types.ModuleType("released_elsa")
    package.__path__ = []  # type: ignore[attr-defined]
    stub, absent = types.ModuleType("released_elsa.utils"), type("Absent", (), {})
    vars(stub).update(FP8Config=absent, FP8State=absent, ScalingType=absent)
    eight = types.ModuleType("torchao.optim")
    vars(eight).update(Adam8bit=type("Adam8bit", (), {}), Adam4bit=type("Adam4bit", (), {}))
    sys.modules |= {
        "released_elsa": package, "released_elsa.utils": stub,
        "torchao": types.ModuleType("torchao"), "torchao.optim": eight,
    }  # fmt: skip
    optimizers: Any = types.ModuleType("released_elsa.optimizers")
    optimizers.__package__ = "released_elsa"
    exec(compile((code / "lib/optimizers.py").read_text(), "optimizers", "exec"), vars(optimizers))
    released = taken(
        code / "lib/utils.py", "_as_dense_a", "_proj_impl_dense", "projection", DTensor=DTensor, Replicate=Replicate,
        distribute_tensor=distribute_tensor, Optional=typing.Optional, List=list, OptimState8bit=absent,
        OptimState4bit=type("Four", (), {}),
    )  # fmt: skip
    name, rng, steps, every = "model.layers.4.mlp.up_proj", torch.Generator().manual_seed(0), 32, 4
    layer = world.layer(name, weight=world.maps[name].weight.detach()[:64].double())
    # weights in bfloat16 are tied, and there all of a tie go
    first = layer.weight + 1e-5 * torch.randn(layer.weight.shape, generator=rng, dtype=torch.float64)
    target = first + 0.02 * torch.randn(first.shape, generator=rng, dtype=torch.float64)
    keep = first.shape[1] // 2
    for late in (False, True):
        worst = dict[str, float]()
        for schedule in ("constant", "linear", "cosine", "exponential"):
            for most in (0.01, 0.1):
                start = most if schedule == "constant" else most / 100
                w, x = nn.Parameter(first.clone()), nn.Parameter(first.clone())
                adam = optimizers.get_admm_optimizer("adam")(
                    [{"params": [w], "admm": True}], projection_fn=released.projection, sparsity=0.5, interval=every,
                    lmda=most, init_lmda=most / 100, final_lmda=most, lmda_schedule_mode=schedule, total_steps=steps,
                    lr=2e-3, betas=(0.9, 0.95),
                )  # fmt: skip
                adam.split_dtype = adam.dual_dtype = torch.float64
                z = torch.where(best_weights(first.abs(), [keep], "layer")[0], first, 0)
                ours = Map(x, z, keep, 0, Elsa(coupled=True, aware=False))
                before = penalty = start
                for step in range(steps):
                    for group in adam.param_groups:
                        group["lr"] = 2e-3 * (1 - step / steps)
                    for p in (w, x):
                        p.grad = (p.detach() - target) @ layer.gram
                    adam.step()
                    ours.step(2e-3 * (1 - step / steps), step + 1, penalty, rng)
                    if step % every:
                        continue
                    after = scheduled(schedule, start, most, step / steps)
                    if late:
                        ours.put("u", ours.get("u") * before / penalty)
                    ours.project(1.0 if late else penalty / after)
                    before, penalty = penalty, after
                worst[schedule] = max(worst.get(schedule, 0.0), float((w - x).detach().abs().max()))
        when = "at the projection after, as there" if late else "at once, as ours"
        told = ", ".join(f"{schedule} {value:.1e}" for schedule, value in worst.items())
        yield f"weights after {steps} steps, u rescaled {when}", told
    tied = torch.ones(4, 4)
    theirs = released.projection([tied], 0.5, 0, 0, [None])[0]
    kept = int((theirs != 0).sum()), int(best_weights(tied, [2], "layer")[0].sum())
    yield "16 equal weights, of which 8 shall stay: its, ours", f"{kept[0]}, {kept[1]}"
    try:
        released.projection([first], 0.5, 0, 0, [first.square()])
        failed = "it runs"
    except UnboundLocalError as error:
        failed = f"UnboundLocalError: {error}"
    yield "its projection by the second moment, in float32", failed


def scheduled(schedule: str, start: float, end: float, share: float) -> float:
    """λ at a share of all steps, as there."""
    if schedule == "exponential":
        return start * (end / start) ** share
    risen = {"constant": 1.0, "linear": share, "cosine": 0.5 - 0.5 * math.cos(math.pi * share)}[schedule]
    return start + (end - start) * risen


def sheared_llama(world: World, code: Path) -> Rows:
    """Gates of 8 layers of 8 heads and 768 neurons, at random log α."""

    class Time:
        value = 64

        @classmethod
        def from_timestring(cls, _: str) -> Time:
            return cls()

    class Config(dict[str, Any]):
        def __getattr__(self, name: str) -> Any:
            if name in self:
                return self[name]
            raise AttributeError(name)

    there = {"List": list, "Any": Any, "NS": argparse.Namespace, "Time": Time, "Variable": torch.autograd.Variable}
    ends: dict[str, Any] = {"limit_a": -0.1, "limit_b": 1.1, "epsilon": 1e-6}
    released = taken(code / "llmshearing/models/l0_module.py", "Mask", "L0Module", **there, **ends)
    options = Config(
        pruning_modules=["head", "intermediate"],
        start_sparsity=0.0,
        lagrangian_warmup_steps="64ba",
        target_sparsity=0.5,
    )
    shape = Config(
        name="llama", d_model=256, intermediate_size=768, n_heads=8, n_layers=8, vocab_size=4096, l0_module=options
    )
    with contextlib.redirect_stdout(io.StringIO()):
        module = released.L0Module(shape, "cpu").double()
    heads, neurons = module.transform_scores_for_head, module.transform_scores_for_mlp
    there_all = torch.ones(8, 1).double()  # its gates of layers, without which it does not run
    module.transform_scores_for_head = lambda e: (there_all, heads(e)[1])
    module.transform_scores_for_mlp = lambda e: (there_all, neurons(e)[1])
    masks, rng = [module.masks[k] for k in options.pruning_modules], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mask in masks:
            mask.z_loga.copy_(3 * torch.randn(mask.z_loga.shape, generator=rng, dtype=torch.float64))
        module.lambdas["lambda_1"].fill_(0.7)
        module.lambdas["lambda_2"].fill_(1.9)
    log_alpha = torch.cat([mask.z_loga.detach().flatten() for mask in masks])
    price = torch.cat([torch.full((m.z_loga.numel(),), float(m.num_params_per_mask)).double() for m in masks])
    u = torch.rand(len(price), generator=rng, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    drawn = [
        m.quantile_concrete(part.reshape(m.z_loga.shape)).clamp(0, 1).flatten()
        for m, part in zip(masks, u.split([m.z_loga.numel() for m in masks]), strict=True)
    ]
    opens = torch.cat([part.flatten() for part in module.calculate_expected_score_sparsity()[0].values()])
    gates = float((torch.cat(drawn) - hard_concrete.drawn(log_alpha, u)).detach().abs().max())
    chances = float((opens - hard_concrete.opens(log_alpha)).detach().abs().max())
    yield "drawn gates, chances to be open", f"{gates:.0e}, {chances:.0e}"
    slopes = []
    for step in (16, 64, 200):
        loss, _ = module.lagrangian_regularization(step)
        theirs = torch.cat([part.flatten() for part in torch.autograd.grad(loss, [m.z_loga for m in masks])])
        leaf = log_alpha.clone().requires_grad_()
        over = 1 - price / price.sum() @ hard_concrete.opens(leaf) - 0.5 * min(1.0, step / 64)
        (ours,) = torch.autograd.grad(0.7 * over + 1.9 * over.square(), leaf)
        slopes.append(apart(ours, theirs))
    yield "slopes of the Lagrangian at 3 steps", f"‖·‖ {max(slopes):.0e}"
    masks[1].target_mask_size = 400
    theirs, ours = (
        masks[1]._deterministic_z(masks[1].z_loga[0].detach()),
        hard_concrete.gate(masks[1].z_loga[0].detach()),
    )
    best = ours >= ours.sort().values[-400]
    most = float((theirs - ours * best).abs().max())
    yield "the gates without chance, 400 of 768", f"{most:.0e}, same set: {bool(((theirs > 0) == best).all())}"


def ddp_(world: World, code: Path) -> Rows:
    """Gates of 8 layers of 768 neurons at random z."""
    there = {"dataclass": dataclass, "field": field, "List": list, "Any": Any, "Optional": typing.Optional}
    ends: dict[str, Any] = {"limit_a": -0.1, "limit_b": 1.1}
    names = "L0Config", "ste_clamp", "ste_relu", "Mask", "L0Module"
    released = taken(code / "main.py", *names, **there, **ends)
    options = {"pruning_modules": ["intermediate"], "num_layers": 8, "intermediate_size": 768}
    module = released.L0Module(released.L0Config(target_sparsity=0.5, **options)).double()
    mask, rng = module.masks["intermediate"], torch.Generator().manual_seed(0)
    with torch.no_grad():
        mask.z_loga.copy_(0.4 + 0.5 * torch.randn(8, 768, generator=rng, dtype=torch.float64))
        for i, value in enumerate((0.7, 1.9, 0.4), 1):
            module.lambdas[f"lambda_{i}_intermediate"].fill_(value)
    z, own = mask.z_loga.detach().flatten(), ddp.STEEP
    for steep in (2.4, own):
        ddp.STEEP, gates, slopes = steep, list[float](), list[float]()
        for progress in (0.0, 0.25, 1.0):
            width = 0.5 - 0.4 * progress**0.5
            gates.append(
                float((mask.soft_saturation(mean=width).flatten() - ddp.smoothed(z, width)).detach().abs().max())
            )
            (theirs,) = torch.autograd.grad(module.lagrangian_regularization(progress).sum(), mask.z_loga)
            # what is over there is what is short here
            signs = torch.tensor([-0.7, 1.9, 0.4]).double()
            slopes.append(
                apart(ddp.lagrangian(z, signs, torch.full_like(z, 1 / len(z)), 0.5, width)[1], theirs.flatten())
            )
        yield (
            f"smoothed gates and slopes of the Lagrangian, steepness {steep:.4g}",
            f"{max(gates):.0e}, {max(slopes):.0e}",
        )
    ddp.STEEP = own
    module.eval()
    exact, exported = int((mask.deterministic_z(False) > 0).sum()), int((z > 0).sum())
    yield "neurons of 6,144 that it judges, and that it exports", f"{exact:,}, {exported:,}"


def grasprune(world: World, code: Path) -> Rows:
    """200 random scores of 4 blocks of 48 neurons and 4 KV groups, at 50 %."""
    there = {"Any": Any, "get_transformer_layers": lambda model: model.layers}
    released = taken(code / "pipeline.py", "build_batch_budget_masks", **there)
    knapsack = Knapsack(space_of([48, 4] * 4, [1, 16] * 4, 0.5))
    budget, over, unspent, less, differ = float(knapsack.price.sum()) / 2, 0, list[float](), 0, 0
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        blocks = [
            argparse.Namespace(
                mlp=argparse.Namespace(gate_score=torch.randn(48, generator=rng)),
                self_attn=argparse.Namespace(gate_score_kv=torch.randn(4, generator=rng)),
            )
            for _ in range(4)
        ]
        model = argparse.Namespace(layers=blocks)
        found = released.build_batch_budget_masks(model, torch.tensor(1.0), torch.tensor(16.0), 0.5, 1.5)
        theirs = torch.cat([keep for _, _, keep in found])
        scores = [s for block in blocks for s in (block.mlp.gate_score, block.self_attn.gate_score_kv)]
        worth = knapsack.price * torch.sigmoid(torch.cat(scores) / 1.5).double()
        ours, spent = knapsack.project(worth), float(knapsack.price @ theirs.double())
        over, differ = over + (spent > budget), differ + int((ours ^ theirs).sum())
        if spent <= budget:
            unspent.append(1 - spent / budget)
            less += float(worth[ours].sum()) < float(worth[theirs].sum()) - 1e-9
    yield "sets over the budget, of 200: its, ours", f"{over}, 0"
    yield (
        "unspent by the others: mean, most; ours worth less",
        f"{sum(unspent) / len(unspent):.2%}, {max(unspent):.2%}; {less}",
    )
    yield "groups of 208 that differ, on average", f"{differ / 200:.1f}"


def bypass(world: World, code: Path) -> Rows:
    """One update of 48 probabilities, and the projection."""
    layer_type = type("Wrapped", (), {})
    released = taken(code / "prune_channel/pgpruning.py", "ChannelPGPruner", WrappedLlaMaLayer=layer_type, np=np)
    steps, rng = list[float](), torch.Generator().manual_seed(0)
    rate = argparse.Namespace(get_last_lr=lambda: [1.0], step=lambda: None)

    def wrapped() -> Any:
        layer: Any = layer_type()
        layer.attn_scores = 0.05 + 0.9 * torch.rand(8, generator=rng, dtype=torch.float64)
        layer.mlp_scores = 0.05 + 0.9 * torch.rand(40, generator=rng, dtype=torch.float64)
        return layer

    for draws in (2, 4):
        layer = wrapped()
        p = torch.cat([layer.attn_scores, layer.mlp_scores])
        masks = [torch.bernoulli(p, generator=rng) for _ in range(draws)]
        layer.stored_attn_mask = torch.stack([m[:8] for m in masks])
        layer.stored_mlp_mask = torch.stack([m[8:] for m in masks])
        losses = [torch.tensor(4 + 0.3 * k * k, dtype=torch.float64) for k in range(draws)]
        mean_ = torch.stack(losses).mean()
        holder = argparse.Namespace(
            baseline_delta=mean_, lamda=1.0, cancel_ma_baseline=False, penalty_lamda_init=-1.0, writer=None, K=draws,
            subnet=argparse.Namespace(model=argparse.Namespace(layers=[layer])), attn_score_scheduler=rate,
            mlp_score_scheduler=rate, DEBUG=False, step=0, total_iters=1, penalty_lamda_final=-1.0,
        )  # fmt: skip
        released.ChannelPGPruner.inplace_update_scores_by_pg_grad(holder, mean_, losses, torch.ones(draws).bool())
        moved = p - torch.cat([layer.attn_scores, layer.mlp_scores])
        steps.append(apart(bypass_bp.gradient(p, masks, [float(loss) for loss in losses]), moved))
    yield "first update of 2 and 4 draws, without its penalty", f"‖·‖ {max(steps):.0e}"
    for target in (0.4, 0.9):
        layer = wrapped()
        p = layer.mlp_scores.clone()
        holder = argparse.Namespace(subnet=argparse.Namespace(model=argparse.Namespace(layers=[layer])))
        holder.solve_v_total = lambda share, holder=holder: released.ChannelPGPruner.solve_v_total(holder, share)
        released.ChannelPGPruner.constrainScoreByWhole(holder, target)
        ours = Knapsack(space_of([40], [1000], target)).euclid(p)
        told = f"{float(layer.mlp_scores.sum()):.2f} and {float(ours.sum()):.2f}"
        yield f"expected neurons of 40 where {40 * target:.0f} are asked and {float(p.sum()):.1f} were", told


def lora(world: World, code: Path) -> Rows:
    """A tiny Llama without grouped heads, random adapters; the schedule of 200 steps."""
    linear_type = type("Linear", (nn.Module,), {})
    names = "compute_sensitivity", "schedule_sparsity_ratio"
    released = taken(code / "loraprune/utils.py", *names, NUM_ATTENTION_HEADS=6)
    model = tiny("llama", num_key_value_heads=6, num_hidden_layers=2).float()
    adapter = adapter_for("llama")
    sites = adapter.sites(model)
    gated = GatedModel(model, adapter, sites, toy_tokens(windows=4, seqlen=8), training=Training(rank=3, alpha=6.0))
    assert gated.weights is not None
    torch.manual_seed(0)
    for _, b in gated.weights.adapters.values():
        nn.init.normal_(b, std=0.05)
    caught, inner = dict[Tensor, Tensor](), gated._lora
    gated._lora = lambda slopes: (caught.update(slopes), inner(slopes))[1]  # type: ignore[method-assign]
    query = GateQuery(torch.ones(gated.groups).double(), tuple(range(4)), frozenset({"lora"}))
    told = gated.answer(query).lora
    assert told is not None
    site = torch.cat([torch.full((each.n_groups,), i) for i, each in enumerate(sites)])
    problem: Any = argparse.Namespace(space=argparse.Namespace(sites=sites), site=site)
    ours, totals = lora_prune.LoRAPrune()._importance(problem, told.double()), dict[tuple[int, str], Tensor]()
    for number, block in enumerate(adapter.blocks(gated.model)):
        for name, linear in block.named_modules():
            if linear not in gated.weights.adapters:
                continue
            layer: Any = linear_type()
            for part, own in zip("AB", gated.weights.adapters[linear], strict=True):
                held = nn.Linear(1, 1, bias=False)
                held.weight = nn.Parameter(own.detach())
                held.weight.grad = caught[own]
                setattr(layer, f"lora_{part}", held)
            layer.weight, layer.scaling = linear.get_parameter("weight"), 2.0
            layer.out_features = len(layer.weight)
            attention, last = "self_attn" in name, name.endswith(("o_proj", "down_proj"))
            score = released.compute_sensitivity(layer, attention, "lora", last).detach().double()
            key = number, "attention" if attention else "mlp"
            totals[key] = totals.get(key, torch.zeros_like(score)) + score
    theirs = torch.cat([totals[each.block, each.kind] for each in sites])
    yield f"importance of {len(ours)} groups", f"{float(((theirs - ours).abs() / ours).max()):.0e} at most, relative"
    steps = range(201)
    there = [released.schedule_sparsity_ratio(t, 200, 0.1, 0.1, 0.0, 0.5) for t in steps]
    most = max(abs(0.5 * lora_prune.progress(t / 200, 0.1, 0.1) - own) for t, own in zip(steps, there, strict=True))
    yield "share that is gone after every step", f"{most:.0e} at most"


def gisp(world: World, code: Path) -> Rows:
    """The model with keys and values of its own for every head; its sums are written down after its Algorithm 1."""
    config = copy.deepcopy(world.model.config)
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    config.num_key_value_heads, size = heads, d // heads
    model = LlamaForCausalLM(config).eval()
    state = dict(world.model.state_dict())
    for name in [n for n in state if n.endswith(("k_proj.weight", "v_proj.weight"))]:
        state[name] = state[name].view(groups, size, d).repeat_interleave(heads // groups, 0).reshape(d, d)
    model.load_state_dict(state)
    adapter = adapter_for("llama")
    sites = adapter.sites(model)
    gated = GatedModel(model.requires_grad_(False), adapter, sites, world.tokens)
    windows = tuple(range(len(world.tokens)))
    ours = gated.answer(GateQuery(torch.ones(gated.groups).double(), windows, frozenset({"taylor"}))).taylor
    assert ours is not None
    model.requires_grad_(True)
    for ids in world.tokens.ids:
        (model(ids[None], labels=ids[None]).loss / len(windows)).backward()
    sums = []
    for site in sites:
        block: Any = adapter.blocks(model)[site.block]
        part, names = (block.self_attn, ATTENTION) if site.kind == "attention" else (block.mlp, MLP)
        total = torch.zeros(site.n_groups)
        for name in names:
            weight = getattr(part, name).weight
            scores = (weight * weight.grad).abs().detach()
            total += (scores.T if name == names[0] else scores).reshape(site.n_groups, -1).sum(1)
        sums.append(total.double())
    theirs = torch.cat(sums)
    most = float((theirs - ours).abs().max() / theirs.max())
    yield f"importance of {len(theirs):,} heads and neurons", f"{most:.0e} of the largest"
    attention = torch.cat([torch.full((s.n_groups,), s.kind == "attention") for s in sites])
    own = torch.where(attention, 4 * size * d, 3 * d).double()
    code_ = torch.where(attention, theirs / (4 * size * d), theirs / (3 * config.intermediate_size))
    for share in (0.2, 0.4):
        count = int(len(theirs) * share)
        gone, right = (scores.argsort()[:count] for scores in (code_, theirs / own))
        limit = 1 - float(own[right].sum() / own.sum())
        prices = [int(own[i]) for i in torch.tensor([0, *[s.n_groups for s in sites][:-1]]).cumsum(0)]
        kept = Knapsack(space_of([s.n_groups for s in sites], prices, limit)).project(theirs)
        differ = int((kept ^ ~torch.zeros_like(kept).index_fill(0, right, True)).sum())
        yield (
            f"heads of {int(attention.sum())} that go with {share:.0%} of all units",
            f"{int(attention[gone].sum())} by its divisors, {int(attention[right].sum())} by size; "
            f"ours at that price: {differ} units differ from the order by size",
        )


def slicegpt(world: World, code: Path) -> Rows:
    """Directions from the same sums, and what one basis costs."""
    device = argparse.Namespace(device="cpu")
    released = taken(code / "src/slicegpt/rotate.py", "pca_calc", cleanup_memory=lambda: None, config=device)
    norms = [m for n, m in world.model.named_modules() if n.endswith("norm")]
    streams: list[list[Tensor]] = [[] for _ in norms]
    hooks = [
        norm.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].detach().double()))
        for norm, into in zip(norms, streams, strict=True)
    ]
    with torch.no_grad():
        for ids in world.tokens.ids:
            world.model(ids[None])
    for hook in hooks:
        hook.remove()
    raw = [torch.cat(parts) for parts in streams]
    divided = [x / (x.square().mean(-1, keepdim=True) + world.model.config.rms_norm_eps).sqrt() for x in raw]
    gram = sum((torch.einsum("bti,btj->ij", x, x) / x[..., 0].numel() for x in divided), torch.zeros(()))
    ours = SliceGPT().directions(ResidualStream(torch.ones(len(raw), len(gram)).double(), gram))
    theirs = released.pca_calc([x.clone() for x in divided])[1]
    each = [released.pca_calc([x.clone()])[1] for x in raw]
    for width in (200, 176):
        a, b = ours[:, :width], theirs[:, :width]
        yield f"projectors on {width} of {len(gram)} directions", f"‖·‖ {float((a @ a.T - b @ b.T).norm()):.0e}"

        def lost(bases: list[Tensor], width: int = width) -> float:
            parts = [
                1 - float((x @ q[:, :width]).square().sum() / x.square().sum())
                for x, q in zip(divided, bases, strict=True)
            ]
            return sum(parts) / len(parts)

        yield (
            f"lost of what norms pass on, {width}",
            f"{lost([ours] * len(raw)):.2%} by one basis, {lost(each):.2%} by one for every norm, of the dense model",
        )


def sized(layer: LayerProblem) -> int:
    return layer.weight.numel() + sum(producer.weight.numel() for producer in layer.producers)


def mean(weighted: list[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted)


METHODS: dict[str, tuple[str, Callable[[World, Path], Rows]]] = {
    "svd-llm": ("SVD-LLM", svd_llm),
    "asvd": ("ASVD4LLM", asvd),
    "reap": ("reap", reap),
    "olica": ("LLM-Olica", olica),
    "owl": ("OWL", owl),
    "alpha-pruning": ("AlphaPruning", alpha_pruning),
    "alps": ("ALPS", alps),
    "elsa": ("elsa", elsa),
    "sheared-llama": ("LLM-Shearing", sheared_llama),
    "ddp": ("Deterministic-Differentiable-Pruning", ddp_),
    "grasprune": ("GRASPrune", grasprune),
    "bypass-bp": ("backprop-free_LLM_pruning", bypass),
    "lora-prune": ("LoRAPrune", lora),
    "gisp": ("", gisp),
    "slicegpt": ("TransformerCompression", slicegpt),
    **released_weights.METHODS,
    **released_learners.METHODS,
    **released_groups.METHODS,
}


def main(
    model: str,
    released: Annotated[Path, typer.Option(help="folder of clones")],
    dataset: Annotated[str, typer.Option(help="text to calibrate on")],
    evaluation: Annotated[str, typer.Option(help="text to measure perplexity on")],
    only: Annotated[str, typer.Option(help="names of methods, by comma")] = ",".join(METHODS),
    windows: int = 8,
    seqlen: int = 128,
) -> None:
    """Print a Markdown table; what has no clone in the folder is left out, and said."""
    torch.set_num_threads(1)
    dense = opened(model, device="cpu", dtype="float32")
    data = {
        "dataset": [dataset],
        "evaluation_dataset": evaluation,
        "seqlen": seqlen,
        "evaluation_tokens": windows * 256,
    }
    data |= {"calibration_tokens": windows * seqlen, "search_tokens": seqlen}
    draws = draw(dense.tokenizer, Recipe.load().with_overrides({f"data.{k}": v for k, v in data.items()}).data)
    world = World(dense.model.requires_grad_(False), draws.calibration, draws.evaluation)
    print("| method | compared | difference |\n|---|---|---|")
    for name in only.split(","):
        repository, compared = METHODS[name]
        if repository and not (released / repository).is_dir():
            print(f"| `{name}` | no folder {repository} | – |", flush=True)
            continue
        for what, difference in compared(world, released / repository):
            print(f"| `{name}` | {what} | {difference} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
