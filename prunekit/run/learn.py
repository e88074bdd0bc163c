"""Learned masks: a learner's conversation in the place of a search, and a pruner that refits what it has chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prunekit.data.tokens import TokenBatch
from prunekit.plugins.guard import unchanged
from prunekit.plugins.learner import Decision, GateProblem
from prunekit.report import document as reporting
from prunekit.run.stages import Run, TrainedModel
from prunekit.search.gated import GatedModel
from prunekit.search.lessons import Learned, hold_lesson
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.system.checkpoints import Checkpoints

REPLIES = "learner"  # folder of what the model has answered


def run_learner(runs: Sequence[Run]) -> list[tuple[Supernet, Allocation]]:
    """Let the learner decide for every run, then prune for what it has decided.

    A learner that nests is asked once for all budgets of a family, any other once for each.

    Returns:
        For every run, the network of what was decided, and the decision as an allocation.
    """
    first = runs[0]
    learner = first.parts.learner
    assert learner is not None
    if len(runs) > 1 and not learner.nests:
        first.progress.say(
            f"{type(learner).__name__} decides for one budget at a time: {len(runs)} are learned in turn"
        )
    decisions: list[tuple[Decision, TrainedModel | None]] = []
    for some in [runs] if learner.nests else [[run] for run in runs]:
        learned, trained = _learned(some)
        for run, decision in zip(some, learned.decisions, strict=True):
            names = dict.fromkeys(run.draws.search.origins)
            run.domains.update(zip(names, decision.domains, strict=False))  # of text from one it has no name
            run.learned.update(reporting.learned(run.parts, learned.effort, shared=len(some), domains=run.domains))
            counts = list(decision.counts)
            run.ledger.note({"kind": "decision", "allocation": counts, "of": reporting.decision_digest(decision)})
        decisions += [(decision, trained) for decision in learned.decisions]
    found: list[tuple[Supernet, Allocation]] = []
    for run, (decision, trained) in zip(runs, decisions, strict=True):
        space = run.whole.zoomed(decision.counts, reach=0)
        told = decision if run.parts.recipe.learned != "counts" and run.parts.form.shrinks else None
        if trained is not None and told is not None:
            told = replace(told, scales=None)  # they are part of its weights
        net = run.calibrate(
            space, decision.counts, run.label("prune"), run.clock, search=None, decision=told, trained=trained
        )
        found.append((net, decision.counts))
    return found


def _learned(runs: Sequence[Run]) -> tuple[Learned, TrainedModel | None]:
    """What the learner has come to, one decision for every run, budgets falling from run to run; and the model that it
    has trained along, where it has and the recipe takes it over."""
    run = runs[0]
    learner, text, dense = run.parts.learner, run.draws.search, run.dense
    assert learner is not None
    problem = GateProblem(
        tuple(each.whole for each in runs), len(text), text.seqlen, run.parts.recipe.seed, numbers(text)
    )
    training = learner.training
    teacher = None if run.wide is None else run.wide.model
    model = GatedModel(dense.model, dense.adapter, run.whole.sites, text, dense.shares, training, problem.seed, teacher)
    label = "learn" if len(runs) > 1 else run.label("learn")
    with run.clock("learn"), unchanged(learner, values=True, model=dense.model):
        learned = hold_lesson(
            learner, problem, model, run.ledger, Checkpoints(run.place / REPLIES), progress=run.progress, label=label
        )
        if not learned.weights or run.parts.recipe.learned != "weights":
            return learned, None
        (decision,) = learned.decisions
        return learned, TrainedModel(model.trained(decision), learned.weights)


def numbers(text: TokenBatch) -> tuple[int, ...]:
    """The number of the data set of every window; of text from one, nothing."""
    names = list(dict.fromkeys(text.origins))
    return tuple(map(names.index, text.origins))
