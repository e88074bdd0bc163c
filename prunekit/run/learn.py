"""Learned masks: a learner's conversation in the place of a search, and a pruner that refits what it has chosen."""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.plugins.guard import unchanged
from prunekit.plugins.learner import Decision, GateProblem
from prunekit.report import document as reporting
from prunekit.run.stages import Run
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
    decisions: list[Decision] = []
    for some in [runs] if learner.nests else [[run] for run in runs]:
        learned = _learned(some)
        for run, decision in zip(some, learned.decisions, strict=True):
            run.learned.update(reporting.learned(run.parts, learned.effort, shared=len(some)))
            counts = list(decision.counts)
            run.ledger.note({"kind": "decision", "allocation": counts, "of": reporting.decision_digest(decision)})
        decisions += learned.decisions
    found: list[tuple[Supernet, Allocation]] = []
    for run, decision in zip(runs, decisions, strict=True):
        space = run.whole.zoomed(decision.counts, reach=0)
        told = decision if run.parts.recipe.learned == "groups" else None
        net = run.calibrate(space, decision.counts, run.label("prune"), run.clock, search=False, decision=told)
        found.append((net, decision.counts))
    return found


def _learned(runs: Sequence[Run]) -> Learned:
    """What the learner has come to, one decision for every run: budgets fall from run to run."""
    run = runs[0]
    learner, text, dense = run.parts.learner, run.draws.search, run.dense
    assert learner is not None
    problem = GateProblem(tuple(each.whole for each in runs), len(text), text.seqlen, run.parts.recipe.seed)
    model = GatedModel(dense.model, dense.adapter, run.whole.sites, text, dense.shares)
    label = "learn" if len(runs) > 1 else run.label("learn")
    with run.clock("learn"), unchanged(learner, values=True, model=dense.model):
        return hold_lesson(
            learner, problem, model.answer, run.ledger, Checkpoints(run.place / REPLIES),
            progress=run.progress, label=label,
        )  # fmt: skip
