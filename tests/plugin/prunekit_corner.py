"""One plug-in of every kind for prunekit, and a statistic; any one with its entry point is complete."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import prunekit as pk
from prunekit.calibration.twin import Twin


@dataclass(frozen=True)
class LeaveOneOut(pk.LocalPruner):
    """Keep the groups whose removal alone would cost most.

        cost of group g:   tr[W_g H_gg W_gᵀ]   the output power that goes through it      (1)

    The first step of optimal brain damage on groups, taken for all groups at once.
    """

    refit: bool = True  # least-squares weights for what stays; else the weights as they are

    @property
    def keeps_scales(self) -> bool:
        return not self.refit

    def prune(self, layer: pk.LayerProblem, keeps: Sequence[int]) -> Sequence[pk.Candidate]:
        w, h = layer.weight.double(), layer.gram.double()  # (d_out, d_in), (d_in, d_in)
        groups = [layer.columns([g]) for g in range(layer.n_groups)]
        cost = torch.stack([((w[:, g] @ h[g][:, g]) * w[:, g]).sum() for g in groups])  # (1)
        return [self.keep(layer, kept) for kept in pk.best_groups(cost, keeps)]

    def keep(self, layer: pk.LayerProblem, groups: Sequence[int], scales: torch.Tensor | None = None) -> pk.Candidate:
        return layer.refitted(groups) if self.refit else layer.masked(groups, scales)


@dataclass(frozen=True)
class Loudest(pk.Signal):
    """The share of the power a site receives that comes in through its loudest group."""

    unitless: ClassVar[bool] = True  # of the inputs alone: the weights may be in any unit

    def measure(self, layer: pk.LayerProblem) -> float:
        power = layer.group_sum(layer.gram.diagonal())  # (n_groups,)
        total = float(power.sum())
        return float(power.max()) / total if total > 0 else 0.0


@dataclass(frozen=True)
class Kurtosis(pk.Statistic):
    """E[x̂_j⁴] / E[x̂_j²]², and 0 where nothing is received: 3 of a normal distribution, more of heavy tails."""

    name: ClassVar[str] = "kurtosis"

    def add(self, sums: dict[str, torch.Tensor], received: pk.Received) -> None:
        sums["sum"] += received.inputs.double().pow(4).sum(0)

    def finish(self, sums: dict[str, torch.Tensor], total: pk.Total) -> torch.Tensor:
        fourth, squared = super().finish(sums, total), total.power.square()
        return torch.where(squared > 0, fourth / torch.where(squared > 0, squared, 1), 0)


@dataclass(frozen=True)
class Tails(pk.Signal):
    """The mean kurtosis of what a site receives."""

    unitless: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[pk.Need]:
        return frozenset({Kurtosis()})  # the object itself; it has no entry point

    def measure(self, layer: pk.LayerProblem) -> float:
        return float(layer.require(Kurtosis()).mean())


@dataclass(frozen=True)
class Descent(pk.Allocator):
    """Go to the best neighbour until no neighbour is better."""

    steps: int = 100  # at most

    def search(self, problem: pk.Problem) -> pk.Search:
        here = problem.start
        (best,) = yield [pk.Query(here)]
        for _ in range(self.steps):
            neighbours = list(problem.space.swaps(here))
            if not neighbours:
                break
            losses = yield [pk.Query(there) for there in neighbours]
            if min(losses) >= best:
                break
            best, here = min(zip(losses, neighbours, strict=True))
        return here


@dataclass(frozen=True)
class OneLook(pk.Learner):
    """Keep the groups whose gates the loss would miss most, by one gradient of the dense model.

        effect of group u:   -∂loss/∂gate_u at 1   to first order what its removal adds, 0 where it would help      (1)

    The set of largest total effect within the budget is found by the core.
    """

    tokens: int = 4096  # of the text; whole windows

    def learn(self, problem: pk.GateProblem) -> pk.Lesson:
        (windows,) = problem.batches(1, self.tokens)
        reply = yield pk.GateQuery(torch.ones(problem.groups), windows, frozenset({"gradient"}))
        assert reply.gradient is not None
        return [problem.decision(problem.project((-reply.gradient).clamp_min(0)))]  # (1)

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> pk.Effort:
        return pk.Effort(1, back=seqlen * max(1, min(windows, self.tokens // seqlen)))


@dataclass(frozen=True)
class WorstSite(pk.Objective):
    """J(a) = max_i e_i(a_i): the relative output error of the site that suffers most."""

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        return max(net.site_errors(allocation))

    def reads(self, depth: int) -> pk.Reads:
        return pk.Reads(tokens=False)  # a table look-up; free in the ledger


@dataclass(frozen=True)
class Volume(pk.Finisher):
    """Scale every cut linear map until its output has the power of the dense one's."""

    @torch.no_grad()
    def finish(self, piece: pk.Workpiece) -> dict[str, Any]:
        gains = dict[str, float]()
        with piece.progress.stage("volume", sum(map(bool, piece.kept))) as stage:
            for here in Twin(piece, piece.tokens):
                chunks = range(len(here))
                dense = sum(float(here.wanted(i, "dense").square().sum()) for i in chunks)
                small = sum(float(here.made(i).square().sum()) for i in chunks)
                gains[here.site.name] = (dense / small) ** 0.5 if small else 1.0
                here.linear.weight *= gains[here.site.name]
                stage.advance(note=here.site.name)
        return {"gains": gains}


@dataclass(frozen=True)
class WeightedParameters(pk.Metric):
    """Parameters, those of attention counted several times: what a cache for every user adds to them, roughly."""

    unit: ClassVar[str] = "weighted parameters"

    attention: int = 3  # as dear as so many of the MLP's

    def price(self, site: pk.Site, kept: int) -> int:
        return site.parameters(kept) * (self.attention if site.kind == "attention" else 1)

    def outside(self, sites: Sequence[pk.Site], parameters: int) -> int:
        return parameters


@dataclass(frozen=True)
class Table(pk.Exporter):
    """A table of all tensors and their shapes, and of what every site has kept, as CSV."""

    @property
    def place(self) -> str:
        return "tensors.csv"

    def write(self, product: pk.Product, path: Path) -> None:
        rows = [["tensor", name, "x".join(map(str, p.shape))] for name, p in product.model.named_parameters()]
        rows += [["kept", site["name"], f"{site['kept']} of {site['groups']}"] for site in product.report["sites"]]
        with path.open("x", newline="") as file:
            csv.writer(file).writerows(rows)

    def verify(self, path: Path, probe: pk.Probe) -> None:
        try:
            rows = list(csv.reader(io.StringIO(path.read_text("utf-8")), strict=True))
            shapes = [torch.Size(map(int, shape.split("x"))) for kind, _, shape in rows if kind == "tensor"]
        except (OSError, ValueError, csv.Error) as error:
            raise pk.NotVerified(f"{path} is no table of tensors: {error}") from error
        if (found := sum(shape.numel() for shape in shapes)) != probe.parameters:
            raise pk.NotVerified(f"{path} has {found:,} parameters, not {probe.parameters:,}")

    def size(self, order: pk.Order) -> int:
        return 1 << 16
