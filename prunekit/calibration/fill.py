"""The calibration pass that fills a supernet: block by block, site by site, all rungs at once.

For every site: add up what it receives, state the layer problem, let the pruner answer, measure the
errors, store the candidates, and carry the activations on, so that the next site is pruned for what
it will really see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.calibration.flow import BlockFlow, by_expert
from prunekit.calibration.gradients import Gradients, OutputFisher
from prunekit.calibration.moments import ExpertMoments, Moments
from prunekit.calibration.pool import Pool, Task
from prunekit.calibration.shared import SharedFlow
from prunekit.calibration.statistics import STATISTICS, statistics_of
from prunekit.calibration.sublayer import StreamedSubLayer, in_model, order_of, token_forwards
from prunekit.data.tokens import TokenBatch
from prunekit.errors import PluginError, WrongInput
from prunekit.layer.candidates import Candidate
from prunekit.layer.layouts import layout_of
from prunekit.layer.problem import LayerProblem, Nested, Producer, Truncated
from prunekit.layer.statistics import Need
from prunekit.plugins.adapter import Cut, ModelAdapter
from prunekit.plugins.engine import Team
from prunekit.plugins.guard import instance, number, unchanged
from prunekit.plugins.learner import Decision, Effort
from prunekit.plugins.pruner import LocalPruner
from prunekit.plugins.signal import Signal
from prunekit.search.store import CandidateStore
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation, Site
from prunekit.system.memory import Room, give_back
from prunekit.system.progress import Progress

PRICED_AT_ONCE = 16  # candidates of a site that are made for their price alone
Carry = Literal["dense", "centre", "expected"]
Reader = Callable[[int], Candidate]
"""count -> candidate of a site, in the memory of the machine."""
Prices = tuple[list[float], list[float]]
"""Errors of all counts of a ladder, and nats where they are asked for."""


def build(
    model: nn.Module,
    adapter: ModelAdapter,
    space: Space,
    centre: Allocation,
    pruner: LocalPruner,
    tokens: TokenBatch,
    store: CandidateStore,
    *,
    signals: Sequence[Signal] = (),
    scores: bool = False,
    carry: Carry = "expected",
    damping: float = 0.01,
    dtype: torch.dtype = torch.float32,
    gradients: Gradients | None = None,
    fisher: OutputFisher | None = None,
    sparse: bool = False,
    decision: Decision | None = None,
    contrast: TokenBatch | None = None,
    reference: nn.Module | None = None,
    room: Room | None = None,
    team: Team | None = None,
    devices: Sequence[torch.device] = (),
    progress: Progress,
    label: str = "prune",
) -> tuple[tuple[float, ...], ...]:
    """Fill `store` with candidates for the rungs of `space`, and with what rungs cost.

    Sites that are already stored are not pruned again.

    Candidates are rounded to `dtype` before they are judged: what is measured is what will be saved.

    Args:
        model: the dense model, or one whose weights were trained since; left as it was.
        adapter: of its family.
        space: the sites and their ladders.
        centre: an allocation of it.
        pruner: asked for all rungs of a site at once.
        tokens: of calibration.
        store: receives candidates, errors, and what signals and the pruner say.
        signals: measured at every site.
        scores: whether the pruner is asked what its groups are worth.
        carry: activation propagation, what reaches the next site: the activations of the dense model, of the
            candidate at `centre`, or the expectation over the ladder.
        damping: ridge, as a share of the mean of diag H.
        dtype: of the checkpoint.
        gradients: of the dense model's loss, for plug-ins that need them.
        fisher: of outputs, where rungs are priced in nats as well, or a plug-in needs it.
        sparse: make the candidates of the centre alone; the other rungs are only priced.
        decision: of a learner, whose groups every site keeps: the only rung of every ladder is their count.
        contrast: a second data set, for plug-ins that need it.
        reference: the dense model, where `model` is another: what statistics of a dense stream are of.
        room: where activations are kept.
        team: workers that stream the calibration tokens side by side; None: nobody else.
        devices: that work on layer problems while the pass goes on, as far as it need not wait for them; (): it waits
            for all, on the device of the model. On devices alike the candidates are the same, to the bit.
        progress: advanced at every site.
        label: of the stage.

    Returns:
        Relative output errors by site and rung: 0 lossless, 1 as bad as zeros.

    Raises:
        PluginError: a plug-in needs what cannot be collected, or its answer is wrong.
        WrongInput: what reaches a site is not finite.
    """
    if all(site in store for site in space.sites):
        return tuple(tuple(store.errors(site)) for site in space.sites)
    _check_needs((pruner, *signals), {"gradient": gradients, "output-fisher": fisher, "contrast": contrast})
    needs = pruner.needs.union(*(signal.needs for signal in signals), () if fisher is None else ("output-fisher",))
    statistics, room, other = statistics_of(needs), room or Room(), None
    two = any("dense" in each.sees for each in statistics)
    flow: BlockFlow | SharedFlow = (
        BlockFlow(model, adapter, tokens, dense=two, room=room, reference=reference)
        if team is None
        else SharedFlow(team, tokens, next(model.parameters()).device, dense=two)
    )
    if contrast is not None and "contrast" in needs:
        other = BlockFlow(model, adapter, contrast, dense=False, room=room)
    flows = (flow,) if other is None else (flow, other)
    rungs_of = dict(zip(space.sites, space.ladders, strict=True))
    centre_of = dict(zip(space.sites, centre, strict=True))
    carried = rungs_of if carry == "expected" else {site: (count,) for site, count in centre_of.items()}
    chosen = {} if decision is None else _by_site(space.sites, decision)
    weights = sum(map(adapter.multiplied, adapter.blocks(model))) if "sub-layer" in pruner.needs else 0
    pool = Pool(() if "sub-layer" in pruner.needs else devices)  # who trains runs what the pass itself goes through

    def stated(site: Site) -> list[tuple[LayerProblem, bool]]:
        # moments of wide maps are large: they end with this scope
        receive = "received_by_expert" if site.experts else "received"
        moments, *against = (getattr(each, receive)(site, statistics if each is flow else ()) for each in flows)
        if site in store:
            return []
        if site.experts:
            return expert_problems(
                model, adapter, site, moments, needs, damping, fisher, *against, reference=reference
            )  # fmt: skip
        problem = layer_problem(
            model, adapter, site, moments, needs, damping, gradients, fisher, *against,
            last=not site.input_group, reference=reference,
        )  # fmt: skip
        if "sub-layer" in pruner.needs:
            problem = _beside_its_sublayer(problem, model, adapter, site, flow)
        return [(problem, True)]

    def fill(site: Site) -> Reader:
        if not (problems := stated(site)):
            return partial(store.get, site)
        give_back()  # pruners make large matrices, which find no place in what activations have left
        made = (centre_of[site],) if sparse else rungs_of[site]
        root = None if fisher is None or not site.experts else problems[0][0].output_root  # of what all experts add to
        asked = Asked(
            pruner, site.one, [count * site.tile for count in rungs_of[site]], [count * site.tile for count in made],
            dtype, sparse, chosen.get(site), () if site.experts else signals, scores and not site.experts,
            fisher is not None, root, weights, bool(site.experts),
        )  # fmt: skip
        tasks = [pool.begin(partial(_solve, asked, [problems.pop(0)])) for _ in range(len(problems))]
        pool.end(partial(_put, store, site, made, tasks))
        return partial(store.get, site) if site in store else partial(_read, store, site, made, tasks)

    with progress.stage(label, len(space.sites)) as stage, pool:
        for index, sites in groupby(space.sites, key=lambda site: site.block):
            here = tuple(sites)
            unfinished = any(site not in store for site in here)  # then all are met again: each needs what was before
            # of a pruner that sees this block dense: what the next one is reached through
            behind = dict[Site, Reader]()
            for _, alike in groupby(here, key=lambda site: site.input_group or site.name):
                # what reaches sites of one input does not depend on what is carried by another of them
                readers = {site: fill(site) if unfinished else partial(store.get, site) for site in alike}
                for site, reader in readers.items():
                    weight = None
                    if carry != "dense" and pruner.within == "block":
                        behind[site] = reader
                    elif carry != "dense":
                        weight = expected_weight(reader, carried[site])
                    for each in flows:
                        each.carry(site, weight)
                    stage.advance(note=site.name)
            through = {site: expected_weight(reader, carried[site]) for site, reader in behind.items()}
            for each in flows:
                each.advance(index, through)
            give_back()
    return tuple(tuple(store.errors(site)) for site in space.sites)


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked about a layer: of a site, or of one of its experts."""

    pruner: LocalPruner
    site: Site
    ladder: Sequence[int]
    made: Sequence[int]  # counts of it that candidates are kept of
    dtype: torch.dtype  # of candidates
    sparse: bool  # the other counts are only priced
    chosen: tuple[Sequence[int], Float[Tensor, " kept"] | None] | None  # the groups that a learner keeps, their scales
    signals: Sequence[Signal]
    scores: bool
    nats: bool
    root: Float[Tensor, "d_out d_out"] | None  # R that the prices in nats share with others; None: the layer's own
    weights: int  # that a token is multiplied with in all blocks
    expert: bool  # it is one of several, whose errors weigh as they are powerful

    def root_of(self, whole: LayerProblem) -> Tensor | None:
        """The `output_root`, where rungs are priced in nats."""
        if not self.nats:
            return None
        return whole.output_root if self.root is None else self.root.to(whole.weight.device)


@dataclass(frozen=True)
class Measured:
    """What was measured of a layer and its candidates: no other layer waits for it."""

    errors: list[float]  # of all counts
    nats: list[float]
    signals: list[float]
    scores: list[float] | None
    trained: int  # token-forwards
    power: float | None  # E‖W x‖² of an expert that tokens have reached; None: of any other layer


def _solve(
    asked: Asked, stated: list[tuple[LayerProblem, bool]], device: torch.device | None
) -> tuple[list[Candidate], Callable[[], Measured]]:
    """The candidates of a layer, in the memory of the machine, and what measures the rest.

    `stated`: the layer, and whether tokens have reached it, in a list so that nobody else holds what is large.
    """
    whole, reached = stated.pop()
    whole = whole if device is None else whole.to(device)
    layer = whole.restricted_to(asked.pruner.needs)
    kept, prices = _found(asked, layer, partial(asked.root_of, whole))

    def measure() -> Measured:
        errors, nats = prices()
        numbers = [measured(signal, whole, asked.site) for signal in asked.signals]
        worth = scored(asked.pruner, layer, asked.site) if asked.scores else None
        trained, power = _trained(layer, asked.site, asked.weights), whole.power if asked.expert and reached else None
        return Measured(errors, nats, numbers, worth, trained, power)

    return [in_model(asked.site, candidate).to("cpu") for candidate in kept], measure


def _put(
    store: CandidateStore, site: Site, made: Sequence[int], tasks: Sequence[Task[list[Candidate], Measured]]
) -> None:
    """Store a site when all is there, of an expert in every task where there are several."""
    found, rows = _candidates(site, tasks), [task.rest.result() for task in tasks]
    row = rows[0] if not site.experts else _of_experts(rows)
    store.put(site, found, row.errors, row.signals, row.scores, keeps=made, nats=row.nats, trained=row.trained)


def _candidates(site: Site, tasks: Sequence[Task[list[Candidate], Measured]]) -> list[Candidate]:
    """Those of a site, as soon as they are there."""
    of_tasks = [task.made.result() for task in tasks]
    return [side_by_side(each) for each in zip(*of_tasks, strict=True)] if site.experts else of_tasks[0]


def _read(
    store: CandidateStore, site: Site, made: Sequence[int], tasks: Sequence[Task[list[Candidate], Measured]], count: int
) -> Candidate:
    """A candidate as soon as it is there, as the store will give it."""
    return store.read_back(site, count, _candidates(site, tasks)[made.index(count)])


def _of_experts(rows: Sequence[Measured]) -> Measured:
    """One of all experts of a site of their neurons.

        error = Σ_e P_e error_e / Σ_e P_e,   P_e = E‖W_e x_e‖²        over the experts that tokens have reached

    Nats add up over them.
    """
    share = [row.power or 0.0 for row in rows]
    weights = [power / (sum(share) or 1.0) for power in share]
    errors = [
        sum((w * e for w, e in zip(weights, each, strict=True)), 0.0)
        for each in zip(*(row.errors for row in rows), strict=True)
    ]
    there = [float(row.power is not None) for row in rows]
    nats = [
        sum((t * n for t, n in zip(there, each, strict=True)), 0.0)
        for each in zip(*(row.nats for row in rows), strict=True)
    ]
    return Measured(errors, nats, [], None, 0, None)


def _check_needs(plugins: Sequence[LocalPruner | Signal], other_passes: Mapping[str, Any]) -> None:
    there = {name for name in STATISTICS if other_passes.get(name, ...) is not None}
    for plugin in plugins:
        if unmet := sorted(need for need in plugin.needs if isinstance(need, str) and need not in there):
            raise PluginError(f"{type(plugin).__name__} needs {', '.join(unmet)}, which calibration cannot collect")


def layer_problem(
    model: nn.Module,
    adapter: ModelAdapter,
    site: Site,
    moments: Moments,
    needs: frozenset[Need],
    damping: float,
    gradients: Gradients | None = None,
    fisher: OutputFisher | None = None,
    contrast: Moments | None = None,
    *,
    last: bool = False,
    reference: nn.Module | None = None,
) -> LayerProblem:
    """State the layer problem of a site for plug-ins with these needs; groups made contiguous.

    What need not be arranged is not copied: of wide maps it is large.

    Args:
        model: the dense model.
        adapter: of its family.
        site: a place in it.
        moments: of what the site receives.
        needs: of all plug-ins together.
        damping: ridge, as a share of the mean of diag H.
        gradients: read where "gradient" is needed.
        fisher: read where "output-fisher" is needed.
        contrast: of what the site receives of a second data set.
        last: nobody reads the moments afterwards, so that the gram may take their place.
        reference: whose outputs `cross` is of; None: those of `model`.

    Raises:
        WrongInput: what reaches the site is not finite, or it has no influence to measure.
    """
    if not bool(torch.isfinite(moments.outer.sum())):  # which it is only where all of it is
        raise WrongInput(f"{site.name} receives values that are not finite; try --dtype float32 or other text")
    block = adapter.blocks(model)[site.block]
    order = order_of(site, moments.outer.device)
    joins = adapter.adds_up(block) and adapter.part(site) is not None  # its output is a term of the residual stream
    unseen = [each.name for each in statistics_of(needs) if "residual" in each.sees and each.name != "drift"]
    if unseen and not joins:
        whole = adapter.part(site) is not None
        why = "the stream is not a sum of outputs" if whole else "it is no whole sub-layer"
        raise WrongInput(f"{site.name}: {why}, so there is no {unseen[0]}; choose another signal")
    *front, own = adapter.cuts(block, site)
    straight = site.spread == 1  # wide matrices are not copied for nothing

    def arranged(value: Tensor) -> Tensor:
        return value if straight or not value.ndim else value[..., order]

    def gradient_of(cut: Cut, index: tuple[Any, ...]) -> dict[str, Tensor]:
        if gradients is None or "gradient" not in needs:
            return {}
        gradient, fisher = gradients.read(site.block, cut.path, order.device)
        return {"gradient": gradient[index], "fisher": fisher[index]}

    def producer(cut: Cut) -> Producer:
        taken = cut.taken(block)
        statistics = {**moments.values(taken, cut.path), **gradient_of(cut, (cut.index.flatten().to(order.device),))}
        return Producer(cut.name, taken, statistics)

    def fisher_of(path: str) -> dict[str, Tensor]:
        if fisher is None or "output-fisher" not in needs:
            return {}
        return {"output-fisher": fisher.read(site.block, path, order.device)}

    weight = adapter.linear(block, site).weight.detach()
    values = moments.values(weight) | ({} if contrast is None else {"contrast": contrast.power})
    if reference is not None and "cross" in values:
        before = adapter.linear(adapter.blocks(reference)[site.block], site).weight.detach()
        values["cross"] = moments.values(before)["cross"]
    values = {name: arranged(value) for name, value in values.items()}
    cross, drift, energy = (values.pop(name, None) for name in ("cross", "drift", "energy"))
    producers = "producers" in needs or any("producers" in each.sees for each in moments.statistics)
    gram = moments.settled() if last else moments.gram
    return LayerProblem(
        weight=arranged(weight),
        gram=gram if straight else gram[order][:, order],
        group_size=site.group_size,
        form=site.form,
        damping=damping,
        cross=cross,
        drift=drift,
        energy=None if energy is None else float(energy),
        statistics={**values, **gradient_of(own, (slice(None), order)), **fisher_of(own.path)},
        producers=tuple(producer(cut) for cut in front) if producers else (),
        name=site.name,
    )


def expert_problems(
    model: nn.Module,
    adapter: ModelAdapter,
    site: Site,
    moments: ExpertMoments,
    needs: frozenset[Need],
    damping: float,
    fisher: OutputFisher | None = None,
    contrast: ExpertMoments | None = None,
    *,
    reference: nn.Module | None = None,
) -> list[tuple[LayerProblem, bool]]:
    """State a layer problem for every expert of a site of their neurons, and whether any token has reached it.

    Its inputs are x_e = g_e h_e at all tokens, zero where it is not selected, so that moments count how often an expert
    is selected, and how much. What two experts do at one token is taken to be independent. An expert that no token has
    reached has the identity for a Gram matrix: its neurons go by the size of their weights, which stay.

    Args:
        model, adapter, site, needs, damping, fisher, reference: as of `layer_problem`.
        moments: of what every expert sends on.
        contrast: the same of a second data set.

    Raises:
        WrongInput: what reaches an expert is not finite.
    """
    block, problems = adapter.blocks(model)[site.block], list[tuple[LayerProblem, bool]]()
    weights = [linear.weight.detach() for linear in by_expert(adapter.linear(block, site).weight, site)]
    before = weights
    if reference is not None:
        old = adapter.linear(adapter.blocks(reference)[site.block], site)
        before = [linear.weight.detach() for linear in by_expert(old.weight, site)]
    statistics = dict[str, Tensor]()
    if fisher is not None and "output-fisher" in needs:
        statistics["output-fisher"] = fisher.read(site.block, adapter.path(site), weights[0].device)
    for expert, (weight, dense, own) in enumerate(zip(weights, before, moments.each, strict=True)):
        name = f"{site.name} of expert {expert}"
        if not bool(torch.isfinite(own.outer.sum())):
            raise WrongInput(f"{name} receives values that are not finite; try --dtype float32 or other text")
        values = own.values(weight)
        if reference is not None and "cross" in values:
            values["cross"] = own.values(dense)["cross"]
        if contrast is not None:
            values["contrast"] = contrast.each[expert].power
        cross, energy = values.pop("cross", None), values.pop("energy", None)
        values.pop("drift", None)
        reached = bool(own.power.any())
        gram = own.settled() if reached else torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
        if cross is not None and not reached:
            cross, energy = weight.double(), weight.double().square().sum()
        problem = LayerProblem(
            weight=weight, gram=gram, form=site.form, damping=damping, cross=cross,
            energy=None if energy is None else float(energy), statistics=values | statistics, name=name,
        )  # fmt: skip
        problems.append((problem, reached))
    return problems


def side_by_side(candidates: Sequence[Candidate]) -> Candidate:
    """One candidate of a site of neurons from one of every expert."""
    width = candidates[0].weight.shape[1]
    kept = (e * width + j for e, each in enumerate(candidates) for j in each.kept or ())
    return Candidate(tuple(kept), torch.cat([each.weight for each in candidates], 1))


def _found(
    asked: Asked, layer: LayerProblem, root: Callable[[], Tensor | None]
) -> tuple[list[Candidate], Callable[[], Prices]]:
    """The candidates of the counts that are made, and what prices all counts.

    `root`: the layer's `output_root`, where rungs are priced in nats.
    """
    pruner, site, ladder, dtype = asked.pruner, asked.site, asked.ladder, asked.dtype
    if asked.chosen is not None:
        kept = [kept_groups(pruner, layer, site, *asked.chosen, dtype)]
        return kept, lambda: judged(layer, kept, root())
    if not asked.sparse:
        kept = answers(pruner, layer, site, ladder, dtype)
        return kept, lambda: judged(layer, kept, root())
    if (nested := priced_at_once(pruner, layer, site)) is not None:
        kept = answers(pruner, layer, site, asked.made, dtype, nested)
        return kept, lambda: _all_prices(layer, nested, ladder, root())
    kept, errors, nats = list[Candidate](), list[float](), list[float]()
    # all of those that are kept are asked for together; those that are only priced need not be there at once
    for some in batched(ladder, PRICED_AT_ONCE):
        candidates = answers(pruner, layer, site, some, dtype)
        lost, cost = judged(layer, candidates, root())
        errors, nats = errors + lost, nats + cost
        kept += [c for count, c in zip(some, candidates, strict=True) if count in asked.made]
    return kept, lambda: (errors, nats)


def _all_prices(layer: LayerProblem, nested: Nested | Truncated, ladder: Sequence[int], root: Tensor | None) -> Prices:
    """Of refits that are not made."""
    nats = [] if root is None else nested.nats(root)[list(ladder)].tolist()
    return layer.errors(nested)[list(ladder)].tolist(), nats


def batched(counts: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Some at a time."""
    yield from (counts[start : start + most] for start in range(0, len(counts), most))


def priced_at_once(pruner: LocalPruner, layer: LayerProblem, site: Site) -> Nested | Truncated | None:
    """The pruner's refits of all counts, where it has them."""
    with unchanged(pruner, site.name, values=True, layer=layer):
        nested = pruner.nested(layer) if site.form.shrinks else None
    return instance(pruner, f"its nested refits of {site.name}", nested, (Nested, Truncated, type(None)))


def answers(
    pruner: LocalPruner,
    layer: LayerProblem,
    site: Site,
    keeps: Sequence[int],
    dtype: torch.dtype,
    nested: Nested | Truncated | None = None,
) -> list[Candidate]:
    """The pruner's candidates for `keeps`, of its `nested` refits where they are there, checked and rounded to `dtype`.

    Raises:
        PluginError: a candidate is missing, keeps another count, is not finite or not zero elsewhere.
    """
    with nullcontext() if nested is not None else unchanged(pruner, site.name, values=True, layer=layer):
        answer = pruner.prune(layer, list(keeps)) if nested is None else nested.candidates(keeps)
    proposed = list(instance(pruner, f"what it answers on {site.name}", answer, (Sequence, Iterator)))
    if len(proposed) != len(keeps):
        who = f"{type(pruner).__name__} on {site.name}"
        raise PluginError(f"{who}: {len(keeps)} counts were asked, {len(proposed)} candidates came")
    return [_checked(pruner, layer, site, keep, proposed.pop(0), dtype) for keep in keeps]  # freed when rounded


def kept_groups(
    pruner: LocalPruner,
    layer: LayerProblem,
    site: Site,
    groups: Sequence[int],
    scales: Float[Tensor, " kept"] | None,
    dtype: torch.dtype,
) -> Candidate:
    """The pruner's weights for groups that a learner has chosen, checked and rounded to `dtype`.

    Raises:
        PluginError: it keeps others, or as of `answers`.
    """
    with unchanged(pruner, site.name, values=True, layer=layer):
        answer = pruner.keep(layer, tuple(groups), scales)
    found = _checked(pruner, layer, site, len(groups), answer, dtype)
    if found.kept != tuple(groups):
        raise PluginError(f"{type(pruner).__name__} on {site.name} was to keep {tuple(groups)}, and kept {found.kept}")
    return found


def _checked(
    pruner: LocalPruner, layer: LayerProblem, site: Site, keep: int, proposed: object, dtype: torch.dtype
) -> Candidate:
    """A candidate that was proposed for a count, rounded to `dtype`."""
    who = f"{type(pruner).__name__} on {site.name}"
    candidate = instance(pruner, f"its candidate of count {keep}", proposed, Candidate)
    weight = instance(pruner, f"the weight of count {keep}", candidate.weight, Tensor)
    if not weight.is_floating_point():
        raise PluginError(f"{who}: the weight of count {keep} is {weight.dtype}, and floating point was asked")
    there, asked = tuple(candidate.weight.shape), tuple(layer.weight.shape)
    if there != asked:
        raise PluginError(f"{who}: the weight of count {keep} has shape {there}, and {asked} was asked")
    if not bool(torch.isfinite(candidate.weight).all()):
        raise PluginError(f"{who}: the weight of count {keep} is not finite")
    if fault := layout_of(site).fault(site, keep, candidate, layer.columns) or _fault_in_front(layer, keep, candidate):
        raise PluginError(f"{who}: {fault}")
    return layout_of(site).rounded(candidate, dtype)


def _fault_in_front(layer: LayerProblem, keep: int, candidate: Candidate) -> str:
    """What is wrong with the weights of producer layers that a candidate brings along, in words; empty: nothing."""
    if not candidate.producers:
        return ""
    asked = [] if layer.sublayer is None else layer.sublayer.shapes(keep)
    there = [tuple(each.shape) for each in candidate.producers]
    if there != asked:
        return f"weights of producer layers of shapes {asked} were asked, not {there}"
    if not all(bool(torch.isfinite(each).all()) for each in candidate.producers):
        return f"a weight of a producer layer of count {keep} is not finite"
    return ""


def judged(
    layer: LayerProblem, candidates: Sequence[Candidate], root: Float[Tensor, "d_out d_out"] | None
) -> tuple[list[float], list[float]]:
    """(relative output errors of candidates, their prices in nats per token where there is the `output_root`).

    Of the weight and the moments; where producer layers are other ones too, on the tokens themselves.
    """
    errors, nats = list[float](), list[float]()
    for candidate in candidates:
        if candidate.producers:
            assert isinstance(layer.sublayer, StreamedSubLayer)
            error, price = layer.sublayer.judged(candidate, root)
        else:
            error, price = layer.error(candidate.weight), None if root is None else layer.nats(candidate.weight, root)
        errors.append(error)
        nats += [] if price is None else [price]
    return errors, nats


def _beside_its_sublayer(
    problem: LayerProblem, model: nn.Module, adapter: ModelAdapter, site: Site, flow: BlockFlow | SharedFlow
) -> LayerProblem:
    """The layer problem of a site with the sub-layer that it ends, on what has reached it."""
    assert isinstance(flow, BlockFlow)  # workers have the tokens, and whoever needs them works alone
    block = adapter.blocks(model)[site.block]
    return replace(problem, sublayer=StreamedSubLayer.of(adapter, site, block, flow.stream))


def _trained(layer: LayerProblem, site: Site, weights: int) -> int:
    """Token-forwards that the pruner, and judging what it has trained, has sent through the sub-layer."""
    if not isinstance(layer.sublayer, StreamedSubLayer):
        return 0
    sent = layer.sublayer.sent
    return token_forwards(Effort(0, sent.forward, sent.back), site, weights)


def _by_site(
    sites: Sequence[Site], decision: Decision
) -> dict[Site, tuple[Sequence[int], Float[Tensor, " kept"] | None]]:
    """What a decision says of every site: its groups, and their scales."""
    parts: Sequence[Tensor | None] = [None] * len(sites)
    if decision.scales is not None:
        parts = decision.scales.split([site.n_groups for site in sites])
    return {
        site: (groups, None if scales is None else scales[list(groups)])
        for site, groups, scales in zip(sites, decision.kept, parts, strict=True)
    }


def measured(signal: Signal, layer: LayerProblem, site: Site) -> float:
    """A signal's number.

    Raises:
        PluginError: it is not finite.
    """
    given = layer.restricted_to(signal.needs)
    with unchanged(signal, site.name, values=True, layer=given):
        value = number(signal, f"what it measures on {site.name}", signal.measure(given))
    if not math.isfinite(value):
        raise PluginError(f"{type(signal).__name__} on {site.name}: a finite number was asked, not {value}")
    return value


def scored(pruner: LocalPruner, layer: LayerProblem, site: Site) -> list[float]:
    """What the pruner says each group is worth.

    Raises:
        PluginError: scores are missing or not finite.
    """
    with unchanged(pruner, site.name, values=True, layer=layer):
        values = pruner.scores(layer)
    if not isinstance(values, Tensor) or values.shape != (site.n_groups,) or not bool(torch.isfinite(values).all()):
        who = f"{type(pruner).__name__} on {site.name}"
        raise PluginError(f"{who}: {site.n_groups} finite scores were asked, one for each group, not {values}")
    return values.double().tolist()


def expected_weight(read: Reader, counts: Sequence[int]) -> Float[Tensor, "d_out d_in"]:
    """W̄ = Σ_k k Ŵ_k / Σ_k k over kept counts: the mean activation of the ladder in one weight.

    Týr-the-Pruner (arXiv 2503.09657), expectation error accumulation: rungs weigh by what they keep;
    by linearity one forward with W̄ is the weighted mean of one forward per rung.

    Args:
        read: the candidates of a site.
        counts: kept groups, or weights per row, of the rungs.

    Returns:
        W̄ in float64; zeros where all counts are 0.
    """
    total = sum(counts)
    mean = read(counts[0]).weight.double() * (counts[0] / total if total else 0.0)
    for count in counts[1:]:
        mean += read(count).weight.double() * (count / total)
    return mean
