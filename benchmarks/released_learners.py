"""Rules of learners beside released code: one step on the same numbers."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from released_tools import Rows, World, apart, taken
from torch import Tensor, nn

from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.learner import GateQuery
from prunekit.search.gated import GatedModel
from prunekit.space.forms import parse_form
from prunekit_strategies.learners import bip, domains, sls


def sls_(world: World, code: Path) -> Rows:
    """Slopes of the scores of all 56 maps, patterns of 16 at random scores, two windows."""
    source = code / "super-resolution/src/model/common.py"
    cpu = {"torch.cuda.": "torch."}
    released = taken(source, "SparseConv", "reshape_1d", changes=cpu, copy=copy)
    m, penalty, windows = 16, 0.1, (0, 1)
    rng = torch.Generator().manual_seed(0)
    model = copy.deepcopy(world.model)
    maps = [model.get_submodule(name) for name in world.maps]
    for linear in maps:  # weights in bfloat16 are tied, and ranks of a tie are anyone's
        linear.weight += 1e-4 * torch.randn(linear.weight.shape, generator=rng)
    adapter = adapter_for("llama")
    sites = adapter.sites_of(model, parse_form(f"7:{m}"))
    gated = GatedModel(model, adapter, sites, world.tokens)
    q = 0.85 + 0.18 * torch.rand(len(sites), m, generator=rng, dtype=torch.float64)
    q[:, 0] = 1
    p = q.cumprod(1)
    reply = gated.answer(GateQuery((p > 0.5).double().flatten(), windows, frozenset({"gradient"})))
    assert reply.gradient is not None
    price = torch.cat([torch.full((m,), world.maps[name].weight.numel() / m).double() for name in world.maps])
    leaf = q.flatten().requires_grad_()
    made = sls.products(leaf, [m] * len(sites)) @ (reply.gradient.double() + penalty * price / price.sum())
    (ours,) = torch.autograd.grad(made, leaf)

    class Map(nn.Module):
        """A linear map as its convolution."""

        def __init__(self, linear: nn.Linear, scores: Tensor) -> None:
            super().__init__()
            self.conv = released.SparseConv(*reversed(linear.weight.shape), 1, bias=False, M=m)
            self.conv.weight.data = linear.weight.detach()[..., None, None].clone()
            self.conv.update_pruning_units()
            self.conv.priority_scores.data = scores.float()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)

    order = {name: i for i, name in enumerate(world.maps)}
    for name, i in order.items():
        holder, _, part = name.rpartition(".")
        setattr(model.get_submodule(holder), part, Map(maps[i], q[i, 1:]))
    convolutions = [model.get_submodule(name).conv.train() for name in world.maps]
    ids = world.tokens.ids[list(windows)]
    loss: Any = sum(model(each[None], labels=each[None]).loss for each in ids) / len(ids)
    costs = [conv.compute_costs() for conv in convolutions]
    loss = loss + penalty * sum(own for own, _ in costs) / sum(whole for _, whole in costs)
    loss.backward()
    theirs = torch.stack([conv.priority_scores.grad for conv in convolutions]).double()
    other = sum(
        int((conv.pruning_units.flatten(1)[rank].bool() != (gated._rank[site] == rank).flatten()).sum())
        for conv, site in zip(convolutions, sites, strict=True)
        for rank in range(m)
    )
    weights = sum(linear.weight.numel() for linear in maps)
    yield (
        f"slopes of {theirs.numel()} scores, ranks of {weights:,} weights",
        (f"‖·‖ {apart(ours.reshape(len(sites), m)[:, 1:], theirs):.0e}, {other // 2} ranks differ"),
    )
    above = q.clone().detach()
    above[0] = torch.tensor([1, 0.7, 0.7, *[1.03] * 13])
    kept = above[0].cumprod(0) > 0.5
    falls = sls.falling(above[0].cumprod(0), [m]) > 0.5
    yield "ranks kept at scores 1, 0.7, 0.7, 13 times 1.03", f"{places(kept)}; ours {places(falls)}"


def places(kept: Tensor) -> str:
    return ", ".join(str(i + 1) for i in kept.nonzero().flatten().tolist())


def bip_(world: World, code: Path) -> Rows:
    """Two steps of its trainer on 32 filters of 256 channels, scores above 0."""
    layers = taken(code / "models/layers.py", "GetSubnetFilter", "SubnetConvFilter", autograd=torch.autograd,
                   Parameter=nn.Parameter)  # fmt: skip
    names = "switch_to_bilevel", "switch_to_prune", "switch_to_finetune", "freeze_vars", "unfreeze_vars"
    tools = taken(code / "utils/model.py", *names)
    meter = type(
        "Meter", (), {"__init__": lambda *_, **__: None, "update": lambda *_: None, "display": lambda *_: None}
    )
    released = taken(
        code / "trainer/bilevel.py", "train", accuracy=lambda *_, **__: ([0.0], [0.0]), AverageMeter=meter,
        ProgressMeter=meter, time=argparse.Namespace(time=lambda: 0.0), **{n: getattr(tools, n) for n in names[:3]},
    )  # fmt: skip
    name, filters = "model.layers.4.mlp.up_proj", 32
    weight, x = world.maps[name].weight.detach()[:filters].double(), world.inputs[name]
    labels = torch.randint(filters, (len(x),), generator=torch.Generator().manual_seed(0))
    net: Any = layers.SubnetConvFilter(weight.shape[1], filters, 1, bias=True).double()
    net.set_prune_rate(0.5)
    with torch.no_grad():
        net.bias.zero_()
        net.weight.copy_(weight[..., None, None])
        net.popup_scores.copy_(net.weight.abs())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = net

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[..., None, None]).flatten(1)

    batches = [(part, target) for part, target in zip(x.split(len(x) // 4), labels.split(len(x) // 4), strict=True)]
    model, lr2 = Net(), 0.1
    # weights stand still, so that slopes of both steps are of the same point
    weights, scores = torch.optim.SGD([net.weight, net.bias], lr=0.0), torch.optim.SGD([net.popup_scores], lr=0.0)
    seen = list[Tensor]()
    scores.register_step_pre_hook(lambda *_: seen.append(net.popup_scores.grad.clone()))
    options = argparse.Namespace(accelerate=False, lr2=lr2, print_freq=1)
    with contextlib.redirect_stdout(io.StringIO()):
        loaders = [batches[0], batches[2]], [batches[1], batches[3]]
        released.train(model, "cpu", loaders, F.cross_entropy, (weights, scores), 0, options)
    slope = []
    mask = layers.GetSubnetFilter.apply(net.popup_scores.detach().abs(), 0.5, 2)
    for part, target in (batches[0], batches[1], batches[2]):
        leaf = (net.weight.detach() * mask).requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(F.conv2d(part[..., None, None], leaf).flatten(1), target), leaf)
        slope.append(g)
    theta = net.weight.detach()
    own = (theta * slope[0]).sum((1, 2, 3))
    ours = bip.hypergradient(own, (mask * slope[0] * slope[1]).sum((1, 2, 3)), 1 / lr2)
    first = seen[0].sum((1, 2, 3))
    square = (theta * slope[0]).square()
    said = apart(seen[0], theta * slope[0] - lr2 * square)
    bare = apart(own, first + lr2 * square.sum((1, 2, 3)))
    yield (
        "first step of 32 filters",
        (
            f"θ∘g - (θ∘g)² / γ: ‖·‖ {said:.0e}; ours, the second term of two batches: ‖·‖ {apart(ours, first):.0e}, "
            f"and without the second terms {bare:.0e}"
        ),
    )
    now = theta * slope[2]
    said, stale = (apart(seen[1], now - lr2 * now * (now + more)) for more in (0, seen[0]))
    yield (
        "second step",
        (f"θ∘g - (θ∘g)² / γ: ‖·‖ {said:.0e}; with the slope of the step before still in the second factor {stale:.0e}"),
    )


def dr_pruning(world: World, code: Path) -> Rows:
    """Shares of 7 data sets at 200 random losses; what a curve of 60 points says of its end."""
    folder = code / "drpruning/callbacks"
    released = taken(folder / "DRO_loading_callback.py", "DRPruningCallback", "bisection", Callback=object, np=np)
    first = [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15]
    rng, differ = torch.Generator().manual_seed(0), dict[int, list[float]]()
    for _ in range(200):
        lost = 2 + 0.5 * torch.rand(7, generator=rng, dtype=torch.float64)
        reference = (2 + 0.3 * torch.rand(7, generator=rng, dtype=torch.float64)).tolist()
        ours = domains.worst(first, domains.excess(lost.tolist(), reference), 0.1, 0.2)
        for clamp in (0, 1):
            callback = argparse.Namespace(
                sum_losses=lost, reference_loss=reference, rho=0.1, p_train=torch.tensor(first).double(), min_prob=0.2,
                clamp_q_to_min=clamp, tol=1e-12, clear_history=False, n_domains=7,
            )  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                theirs = released.DRPruningCallback.update_mw(callback)
            differ.setdefault(clamp, []).append(max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    yield (
        "shares of 7 data sets, 200 times, without and with its last clamp",
        (f"{max(differ[0]):.0e} and {max(differ[1]):.3f} at most"),
    )
    moved = argparse.Namespace(
        update_mw=lambda: [0.5, 0.3, 0.2], dynamic_proportion=True, update_steps=300, proportion=[1 / 3] * 3,
        p_train=torch.full((3,), 1 / 3),
    )  # fmt: skip
    state: Any = argparse.Namespace(
        train_dataloader=argparse.Namespace(dataset=argparse.Namespace(update_proportion=lambda _: None)),
        max_duration=argparse.Namespace(value=1000),
    )
    released.DRPruningCallback.update_proportion(moved, state)
    still = float((moved.p_train - 1 / 3).abs().max())
    yield "its mixture behind a step of 0.5, 0.3, 0.2, where all began alike", f"moved by {still:.0e}"
    law = taken(folder / "DRO_server.py", "ScalingLaw").ScalingLaw(for_prune=True)
    share = torch.arange(3, 63).double() / 100
    kept = 1 - 0.5 * (share / 0.2).clamp_max(1)
    off = list[tuple[float, float]]()
    for beta, noise in ((0.3, 0.0), (0.3, 0.01), (0.7, 0.01)):
        truth = lambda t, s, beta=beta: 0.3 * t**-beta + 1.5 * s**-0.3  # noqa: E731
        losses = truth(share, kept) + noise * torch.randn(60, generator=rng, dtype=torch.float64)
        found = law.optimize(torch.stack([share, 1 - kept]).float(), losses.float(), torch.tensor([[1.0], [0.5]]))
        mine = min(domains.foretold(torch.stack([share, kept], 1), losses, (1.0, 0.5)), float(losses.min()))
        end = float(truth(torch.tensor(1.0), torch.tensor(0.5)))
        off.append((min(found[-2], float(losses.min())) - end, mine - end))
    told = ", ".join(f"{a:+.3f} and {b:+.3f}" for a, b in off)
    yield "loss that is foretold at the end, its and ours, three curves", f"{told} beside the truth"


METHODS: dict[str, tuple[str, Callable[[World, Path], Rows]]] = {
    "sls": ("SLS_CVPR2022", sls_),
    "bip": ("BiP", bip_),
    "dr-pruning": ("DRPruning", dr_pruning),
}
