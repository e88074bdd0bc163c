"""The stages of one run: calibration pass, conversation of the search, rebuild, timing."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from prunekit.calibration.fill import build
from prunekit.calibration.gradients import FISHER_TOKENS, Gradients, OutputFisher
from prunekit.data.draws import Draws
from prunekit.errors import PluginError
from prunekit.export import hf
from prunekit.measure.perplexity import Perplexity, perplexity
from prunekit.measure.samples import NEW, PROMPTS, Sample, samples
from prunekit.models import paging
from prunekit.plugins.allocator import Problem
from prunekit.plugins.dense import Dense
from prunekit.plugins.engine import Team
from prunekit.plugins.guard import instance, unchanged
from prunekit.plugins.learner import Decision
from prunekit.plugins.metric import MeasuredMetric
from prunekit.recipe.resolve import Parts
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.run.allotment import Allotment
from prunekit.run.clock import Clock
from prunekit.run.together import Measures
from prunekit.search.conversation import Known, converse
from prunekit.search.ledger import Ledger
from prunekit.search.shared import SharedSupernet
from prunekit.search.store import CandidateStore
from prunekit.search.supernet import Supernet
from prunekit.search.teacher import Teacher
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation
from prunekit.system.files import Damaged, clear, read_state, write_state
from prunekit.system.memory import Room
from prunekit.system.progress import Progress

SECONDS = "seconds.json"  # beside the candidates: what their calibration pass took


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """The model that a learner has trained along with its gates, which are part of its weights."""

    model: PreTrainedModel
    digest: str  # of all that made it


@dataclass(frozen=True, eq=False)
class Run:
    """One small model in the making, and what its stages need."""

    parts: Parts
    dense: Dense
    whole: Space  # every count of every site, under the budget
    draws: Draws
    ledger: Ledger
    place: Path  # what this run alone can use again
    shelf: Path  # calibration passes, which other runs over the model may share
    progress: Progress
    clock: Clock
    teacher: Teacher  # of all runs over the model
    limit: int  # bytes of memory that it may take
    team: Team | None  # who shares the work; None: nobody
    allotment: Allotment | None = None  # of the recipe's time; None: it has none
    decided: dict[str, int] = field(default_factory=dict)  # recipe key -> what the clock has said
    learned: dict[str, Any] = field(default_factory=dict)  # what the learner has read, for the report
    domains: dict[str, float] = field(default_factory=dict)  # share of the text, as the learner has left it, by label
    problems: list[Problem] = field(default_factory=list)  # that its allocator was given, pass by pass
    wide: Dense | None = None  # the model of which `dense` is a narrower one, or one of fewer experts; None: neither
    measures: Measures | None = None  # of its first calibration pass, with what others read there; None: its own
    share: float | None = None  # of what is to go, that the residual width takes, where several are tried; None: no
    shares: Sequence[Mapping[str, Any]] = ()  # what was found with each of them, for the report
    among: int = 1  # searches that the limit of token-forwards is for

    @property
    def original(self) -> Dense:
        """The model before anything was removed, which results are measured against."""
        return self.wide or self.dense

    @cached_property
    def room(self) -> Room:
        """For activations."""
        return Room(self.dense.shares.activations, clear_folder(self.place / "activations"))

    def blocks(self, parameters: int) -> int | None:
        """Bytes of blocks to hold at once, of a model of so many parameters; None: it fits whole, in float32."""
        return None if 1.2 * 4 * parameters < self.limit else self.dense.shares.blocks

    def label(self, stage: str) -> str:
        """A stage that every member of a family has, or every share of the width that is tried."""
        recipe = self.parts.recipe
        if self.share is not None:
            return f"{stage} at share {self.share:g}"
        return f"{stage} for {recipe.sparsity}" if recipe.family else stage

    def measure_dense(self) -> Perplexity:
        """Measure the model as it was on the evaluation text."""
        with self.clock.shared("evaluate"):
            return perplexity(self.original.model, self.draws.evaluation)

    def calibrate(
        self,
        space: Space,
        centre: Allocation,
        label: str,
        clock: Clock,
        *,
        search: int | None,
        priced: bool = True,
        decision: Decision | None = None,
        trained: TrainedModel | None = None,
    ) -> Supernet:
        """Make the calibration pass along all rungs, go on with one that was interrupted, or read a finished one.

        Args:
            space: one candidate is made for every rung of its ladders.
            centre: what activation propagation follows where the recipe's `carry` is centre.
            label: what the stage is called.
            clock: whose seconds it takes.
            search: which it is for, from 0: what the allocator reads of layers, sensitivity metrics and scores, is
                measured on the way; None: for none.
            priced: whether rungs are priced in nats too, where anybody reads that.
            decision: of a learner: the groups that every site keeps; None: the pruner chooses.
            trained: what is pruned in the place of the dense model. Dense streams, to which refits return, stay those
                of the dense model.

        Returns:
            The network that can be asked about every allocation of the space.
        """
        dense, parts, recipe, draws = self.dense, self.parts, self.parts.recipe, self.draws
        model, reference = (dense.model, None) if trained is None else (trained.model, dense.model)
        other = None if trained is None else trained.digest  # of weights that are not the dense model's
        team, teacher = self.team, reference
        alone = "sub-layer" in parts.pruner.needs  # of the tokens, which workers have
        if self.wide is not None:  # workers have that one
            other = dense.fingerprint if other is None else _name([dense.fingerprint, other])
            team, teacher = None, self.wide.model
        depth = len(dense.adapter.blocks(dense.model))
        measures = self._measures(search) if search is not None else Measures(nats=priced and parts.prices_nats(depth))
        signals, scores, nats = measures.signals, measures.scores, measures.nats
        sparse = search is not None and parts.prices_alone(depth)
        key = {  # whatever it depends on: a run that has made the same pass over this model need not again
            "sites": [[site.name, site.n_groups] for site in space.sites],
            "ladders": [list(ladder) for ladder in space.ladders],
            "centre": list(centre) if recipe.carry == "centre" or sparse else None,
            "tokens": [[t.digest, *t.ids.shape] for t in (draws.calibration, draws.contrast) if t is not None],
            "measured": [*map(repr, signals), scores, *([recipe.seed] if nats else []), *(["alone"] if sparse else [])],
            **{name: getattr(recipe, name) for name in ("structure", "pruner", "carry", "damping")},
            **({} if decision is None else {"decision": reporting.decision_digest(decision)}),
            **({} if other is None else {"weights": other}),
        }
        store, started = self._store(self.shelf / f"walk-{_name(key)}", key), time.perf_counter()
        new, gradients, fisher = any(site not in store for site in space.sites), None, None
        if new and any("gradient" in plugin.needs for plugin in (parts.pruner, *signals)):
            # of the dense model: every pass reads the same
            of = draws.calibration.digest[:16] + ("" if other is None else f"-{other[:16]}")
            gradients = Gradients.collected(
                model, dense.adapter, draws.calibration, self.shelf / f"gradients-{of}", self.progress, self.room
            )
        if new and (nats or any("output-fisher" in plugin.needs for plugin in (parts.pruner, *signals))):
            tokens = draws.calibration.spread(FISHER_TOKENS)
            past = [] if other is None else [other]
            of = _name([tokens.digest, recipe.seed, [site.name for site in space.sites], *past])
            fisher = OutputFisher.collected(
                model, dense.adapter, space.sites, tokens, recipe.seed, self.shelf / f"fisher-{of}",
                self.progress, self.room,
            )  # fmt: skip
        errors = build(
            model, dense.adapter, space, centre, parts.pruner, draws.calibration, store,
            signals=signals, scores=scores, carry=recipe.carry, damping=recipe.damping, dtype=dense.dtype,
            gradients=gradients, fisher=fisher, sparse=sparse, decision=decision, contrast=draws.contrast,
            reference=reference, room=self.room, team=None if alone or trained is not None else team,
            devices=() if alone or self.team is None else self.team.devices, progress=self.progress, label=label,
        )  # fmt: skip
        if spent := store.trained(space.sites):
            self.ledger.train(label, spent)
        try:
            spent = time.perf_counter() - started if new else float(read_state(store.directory / SECONDS))
        except Damaged:  # nothing hangs on it but what the report says
            spent = time.perf_counter() - started
        write_state(store.directory / SECONDS, spent)
        clock.add_pass("prune", store.directory.name, spent)
        net = Supernet(model, dense.adapter, space, errors, store, dense.shares, self.teacher, teacher)
        # workers have the dense model beside them
        return net if team is None or trained is not None else SharedSupernet(net, team)

    def _measures(self, search: int) -> Measures:
        """What is measured on the way for a search: where others share its pass, which is the first, for them too."""
        shared = self.measures if search == 0 else None
        return shared or Measures.of(self.parts, len(self.dense.adapter.blocks(self.dense.model)))

    def _store(self, folder: Path, key: Mapping[str, Any]) -> CandidateStore:
        """Open what is there of a pass, or begin anew where it cannot be trusted."""
        try:
            return CandidateStore(folder, key)
        except Damaged as error:
            self.progress.say(f"{error}; the pass is made anew")
            return CandidateStore(clear_folder(folder), key)

    def ask_allocator(self, net: Supernet, space: Space, start: Allocation, number: int, known: Known) -> Allocation:
        """Hold the allocator's conversation about one calibration pass; all of it goes on record.

        Args:
            net: answers questions.
            space: the ladders of this run, some of the rungs of `net`.
            start: a feasible allocation.
            number: of the pass, from 0.
            known: losses that another run has learnt from the same pass; what is learnt is added.
        """
        recipe, allocator = self.parts.recipe, self.parts.allocator
        every, scores = net.store.measured(space.sites, scores="scores" in allocator.needs)
        names = [*map(repr, self._measures(number).signals)]
        signals = tuple(every[names.index(repr(signal))] for signal in self.parts.signals)
        problem = Problem(
            space, net.table(space), start, recipe.seed, self.draws.search.n_tokens, signals, scores,
            net.table(space, net.nats) if "nats" in allocator.needs else None,
        )  # fmt: skip
        self.problems.append(problem)
        self.ledger.note(reporting.space_record(number, problem))
        objective, limit = self.parts.objective, self.search_budget()
        with self.clock("search"), unchanged(objective, values=True, model=self.dense.model):
            answer = converse(
                allocator, problem, net, objective, self.draws.search, self.ledger,
                pass_number=number, limit=limit, known=known, progress=self.progress,
                label=self.label(f"search {number + 1}"),
            ).answer  # fmt: skip
        self.ledger.note({"kind": "choice", "walk": number, "allocation": list(answer)})
        return answer

    def search_budget(self) -> int | None:
        """Token-forwards that all searches may take: what the recipe says, or its time leaves when the first begins."""
        budget, allotment = self.parts.recipe.search_budget, self.allotment
        searches = self.parts.searches(len(self.dense.adapter.blocks(self.dense.model)))
        if budget is not None:
            return budget // self.among
        if allotment is None or not searches:
            return None
        if "search_budget" not in self.decided:
            question = {"kind": "time", "of": "search_budget"}
            found = self.ledger.once(question, lambda: allotment.search_tokens(self.clock.seconds))
            self.decided["search_budget"] = found
        return self.decided["search_budget"]

    def timeless(self, said: Sequence[Mapping[str, Any]]) -> Recipe:
        """The recipe that makes this result without a clock.

        Args:
            said: what the finishers have reported.
        """
        recipe = self.parts.recipe
        if recipe.time is None:
            return recipe
        finishers = tuple(
            {**spec, **found.get("options", {})} for spec, found in zip(recipe.finishers, said, strict=True)
        )
        return recipe.model_copy(update={"time": None, "finishers": finishers, **self.decided})

    def final_loss(self, net: Supernet, plan: Allocation) -> float:
        """What the objective says of the allocation that is built.

        Raises:
            PluginError: nothing that a loss can be.
        """
        objective = self.parts.objective
        loss = net.loss(objective, plan, self.draws.search)
        if math.isnan(loss) or loss == -math.inf:
            raise PluginError(f"{type(objective).__name__} says {loss} of the answer, which is no loss")
        return loss

    def rebuild(self, net: Supernet, answer: Allocation) -> tuple[Supernet, Allocation]:
        """Prune once more around an answer, where the recipe says so.

        Returns:
            The network, and the allocation to be built of it.
        """
        if not self.parts.recipe.rebuild or self.parts.learner is not None:  # whose decision is what was pruned for
            return net, answer
        allocator = self.parts.allocator
        final = instance(allocator, "its last space", allocator.last_space(self.whole, answer), Space)
        plan = tuple(kept for (kept,) in final.ladders)
        if final.ladders == net.space.ladders:
            return net, plan
        return self.calibrate(final, plan, self.label("rebuild"), self.clock, search=None), plan

    def samples(self, model: PreTrainedModel) -> list[Sample]:
        """What a model makes of as many prompts as the recipe asks for; nothing where it is read block by block."""
        count = self.parts.recipe.samples
        if not count:
            return []
        if self.dense.shares.blocks is not None:
            self.progress.say("the model is read block by block, which is too slow to write: there are no samples")
            return []
        with self.clock("sample"), self.progress.stage("writing samples", 1 + NEW) as stage:
            return samples(model, self.dense.tokenizer, PROMPTS[:count], stage=stage)

    def time_result(self, small: PreTrainedModel, plan: Allocation) -> dict[str, Any] | None:
        """Measure the model as it will be exported beside what a measured metric promised; None: nothing was."""
        budget = self.whole.budget
        if not isinstance(budget.metric, MeasuredMetric):
            return None
        with self.clock("time"):
            with unchanged(budget.metric, values=True, dense=self.dense.model, small=small):
                found = budget.metric.realised(
                    self.dense.model, hf.to_transformers(small, self.dense.adapter),
                    target=float(1 - Fraction(str(self.parts.recipe.sparsity))),
                    promised=(budget.outside + self.whole.cost(plan)) / budget.dense, progress=self.progress,
                )  # fmt: skip
            instance(budget.metric, "what it measured of the result", found, Mapping)
        if not found["kept"]:
            self.progress.say(f"warning: {reporting.kept_promise(found)}")
        return dict(found)


def _name(key: Any) -> str:
    """Of a folder, by what its content depends on."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def assemble(net: Supernet, plan: Allocation, parts: Parts) -> PreTrainedModel:
    """Put the small model together, its tensors its own. Over a paged model it is paged, unless finishers change it."""
    if paging.pager_of(net.model) is None or parts.finishers:
        return paging.whole(net.assemble(plan), net.model)
    weight = next(net.model.parameters())
    return hf.paged(net, plan, weight.dtype, weight.device)


def clear_folder(folder: Path) -> Path:
    """Remove what an interrupted run has left in a folder that is of no use to another: tensors, and lists of them."""
    clear(folder, lambda path: path.suffix in (".safetensors", ".json", ".jsonl"))
    return folder
