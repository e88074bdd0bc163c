"""The calibration pass that fills a supernet: block by block, site by site, all rungs at once.

For every site: add up what it receives, state the layer problem, let the pruner answer, measure the
errors, store the candidates, and carry the activations on, so that the next site is pruned for what
it will really see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.calibration.flow import BlockFlow, by_expert
from prunekit.calibration.gradients import Gradients, OutputFisher
from prunekit.calibration.moments import ExpertMoments, Moments
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
    chosen = {} if decision is None else _by_site(space.sites, decision)
    weights = sum(map(adapter.multiplied, adapter.blocks(model))) if "sub-layer" in pruner.needs else 0

    def stated(site: Site) -> LayerProblem | None:  # moments of wide maps are large: they end with this scope
        moments, against = flow.received(site, statistics), None if other is None else other.received(site)
        if site in store:
            return None
        problem = layer_problem(
            model, adapter, site, moments, needs, damping, gradients, fisher, against,
            last=not site.input_group, reference=reference,
        )  # fmt: skip
        return problem if "sub-layer" not in pruner.needs else _beside_its_sublayer(problem, model, adapter, site, flow)

    def fill(site: Site) -> None:
        if (whole := stated(site)) is None:
            return
        give_back()  # pruners make large matrices, which find no place in what activations have left
        layer, made = whole.restricted_to(pruner.needs), (centre_of[site],) if sparse else rungs_of[site]
        root = None if fisher is None else whole.output_root
        kept, errors, nats = _judged(pruner, layer, site, rungs_of[site], made, dtype, root, sparse, chosen.get(site))
        numbers = [measured(signal, whole, site) for signal in signals]
        worth = scored(pruner, layer, site) if scores else None
        found, trained = [in_model(site, candidate) for candidate in kept], _trained(layer, site, weights)
        store.put(site, found, errors, numbers, worth, keeps=made, nats=nats, trained=trained)

    def fill_experts(site: Site) -> None:
        moments = flow.received_by_expert(site, statistics)
        against = None if other is None else other.received_by_expert(site)
        if site in store:
            return
        problems = expert_problems(model, adapter, site, moments, needs, damping, fisher, against, reference=reference)
        give_back()
        made = (centre_of[site],) if sparse else rungs_of[site]
        root = None if fisher is None else problems[0][0].output_root  # of what all experts add to
        kept, errors, nats = _judged_experts(pruner, problems, site, rungs_of[site], made, dtype, root, sparse)
        store.put(site, kept, errors, [], None, keeps=made, nats=nats)

    with progress.stage(label, len(space.sites)) as stage:
        for index, sites in groupby(space.sites, key=lambda site: site.block):
            here = tuple(sites)
            unfinished = any(site not in store for site in here)  # then all are met again: each needs what was before
            # of a pruner that sees this block dense: what the next one is reached through
            behind = dict[Site, Tensor]()
            for site in here:
                if unfinished:
                    (fill_experts if site.experts else fill)(site)
                counts = rungs_of[site] if carry == "expected" else (centre_of[site],)
                weight = None if carry == "dense" else expected_weight(store, site, counts)
                if weight is not None and pruner.within == "block":
                    behind[site], weight = weight, None
                for each in flows:
                    each.carry(site, weight)
                stage.advance(note=site.name)
            for each in flows:
                each.advance(index, behind)
            give_back()
    return tuple(tuple(store.errors(site)) for site in space.sites)


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


Judged = tuple[list[Candidate], list[float], list[float]]
"""The candidates of counts that are made; errors of all counts, and nats where they are asked for."""


def _judged(
    pruner: LocalPruner,
    layer: LayerProblem,
    site: Site,
    ladder: Sequence[int],
    made: Sequence[int],
    dtype: torch.dtype,
    root: Tensor | None,
    sparse: bool,
    chosen: tuple[Sequence[int], Float[Tensor, " kept"] | None] | None = None,
) -> Judged:
    """What a pruner makes of a layer; `root`: its `output_root`, where rungs are priced in nats; `chosen`: the groups
    that a learner keeps, and their scales."""
    kept: list[Candidate] = []
    errors: list[float] = []
    nats: list[float] = []
    priced = priced_at_once(pruner, layer, site) if sparse and chosen is None else None
    if chosen is not None:
        kept.append(kept_groups(pruner, layer, site, *chosen, dtype))
        errors, nats = judged(layer, kept, root)
    elif priced is not None:
        kept += answers(pruner, layer, site, made, dtype, priced)
        errors += layer.errors(priced)[list(ladder)].tolist()
        if root is not None:
            nats += priced.nats(root)[list(ladder)].tolist()
    else:
        # all of those that are kept are asked for together; those that are only priced need not be there at once
        for some in batched(ladder, PRICED_AT_ONCE) if sparse else (ladder,):
            candidates = answers(pruner, layer, site, some, dtype)
            lost, cost = judged(layer, candidates, root)
            errors, nats = errors + lost, nats + cost
            kept += [c for count, c in zip(some, candidates, strict=True) if count in made]
    return kept, errors, nats


def _judged_experts(
    pruner: LocalPruner,
    problems: Sequence[tuple[LayerProblem, bool]],
    site: Site,
    ladder: Sequence[int],
    made: Sequence[int],
    dtype: torch.dtype,
    root: Tensor | None,
    sparse: bool,
) -> Judged:
    """What a pruner makes of every expert of a site of their neurons.

        error = Σ_e P_e error_e / Σ_e P_e,   P_e = E‖W_e x_e‖²        over the experts that tokens have reached

    Nats add up over them.
    """
    counts, few = ([count * site.tile for count in some] for some in (ladder, made))
    found, share = list[Judged](), list[float]()
    for problem, reached in problems:
        found.append(_judged(pruner, problem.restricted_to(pruner.needs), site.one, counts, few, dtype, root, sparse))
        share.append(problem.power if reached else 0.0)
    weights = [power / (sum(share) or 1.0) for power in share]
    errors = [
        sum((w * e for w, e in zip(weights, each, strict=True)), 0.0)
        for each in zip(*(errors for _, errors, _ in found), strict=True)
    ]
    there = [float(reached) for _, reached in problems]
    nats = [
        sum((t * n for t, n in zip(there, each, strict=True)), 0.0)
        for each in zip(*(nats for _, _, nats in found), strict=True)
    ]
    return [side_by_side(each) for each in zip(*(kept for kept, _, _ in found), strict=True)], errors, nats


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


def expected_weight(store: CandidateStore, site: Site, counts: Sequence[int]) -> Float[Tensor, "d_out d_in"]:
    """W̄ = Σ_k k Ŵ_k / Σ_k k over kept counts: the mean activation of the ladder in one weight.

    Týr-the-Pruner (arXiv 2503.09657), expectation error accumulation: rungs weigh by what they keep;
    by linearity one forward with W̄ is the weighted mean of one forward per rung.

    Args:
        store: holds the candidates.
        site: whose.
        counts: kept groups, or weights per row, of the rungs.

    Returns:
        W̄ in float64; zeros where all counts are 0.
    """
    total = sum(counts)
    mean = store.get(site, counts[0]).weight.double() * (counts[0] / total if total else 0.0)
    for count in counts[1:]:
        mean += store.get(site, count).weight.double() * (count / total)
    return mean
