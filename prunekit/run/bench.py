"""Runs recipes on one open model and measures them on one text: the trials of a study, the cells of a comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel

from prunekit.data.draws import Draws, draw
from prunekit.data.tokens import overlap
from prunekit.errors import WrongInput
from prunekit.measure.perplexity import perplexity
from prunekit.models.opening import limits
from prunekit.plugins.guard import instance
from prunekit.recipe.resolve import Parts
from prunekit.report import document as reporting
from prunekit.run.clock import Clock
from prunekit.run.finish import finish_model
from prunekit.run.search import run_search
from prunekit.run.session import Session
from prunekit.run.spaces import whole_space
from prunekit.run.stages import Run, assemble, clear_folder
from prunekit.run.together import Measures, same_candidates, same_pass
from prunekit.search.exact import Optimum, find_optimum
from prunekit.search.supernet import Supernet
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation


@dataclass(frozen=True, eq=False)
class Made:
    """A recipe that was run: the small model, and what it was made of."""

    run: Run
    net: Supernet
    plan: Allocation
    small: PreTrainedModel
    draws: Draws
    optimum: Optimum | None = None  # of what was searched, beside the answer, where it is known and was asked for

    @property
    def parameters(self) -> int:
        """Of the small model; single weights that are zero do not count."""
        kept = reporting.count(self.small)
        if self.run.parts.form.shrinks:
            return kept
        single = reporting.weights(self.small, self.net, self.plan, self.run.parts.recipe.structure)
        return kept - (single["in_linear_maps"] - single["not_zero"])

    @property
    def objective(self) -> float:
        """What the recipe's objective says of the allocation."""
        return self.net.loss(self.run.parts.objective, self.plan, self.draws.search)


@dataclass(frozen=True, eq=False)
class Bench:
    """One model, one text to be compared on, and a shelf of calibration passes."""

    session: Session  # of the base recipe
    place: Path
    disk: int  # bytes of the shelf
    exact: bool = False  # whether the optimum of what is searched is looked for, where it can be known
    _together: dict[str, Measures] = field(default_factory=dict)  # by what makes a calibration pass

    def announce(self, parts: Parts) -> str | None:
        """Say that a recipe comes: who makes its calibration pass first measures what all read there.

        Returns:
            The name of that pass; None: a learner decides, and it is its own.
        """
        if parts.learner is not None:
            return None
        pass_, own = self._pass_of(parts, self._space(parts))
        self._together[pass_] = own.joined(self._together.get(pass_, own))
        return pass_

    def candidates_of(self, pass_: str) -> str:
        """Short name of the candidates of a pass, once all were announced; recipes that read the same have the same."""
        return hashlib.sha256(same_candidates(pass_, self._together[pass_]).encode()).hexdigest()[:16]

    def separate(self, parts: Parts) -> bool:
        """Let every run of this calibration pass measure for itself; whether they did not so far."""
        if parts.learner is not None:
            return False
        pass_, own = self._pass_of(parts, self._space(parts))
        return self._together.pop(pass_, own) != own

    def ends_in_probes(self, parts: Parts) -> bool:
        """Whether the search of a recipe will be ended by its limit with little beside its probes."""
        spent = self.session.foresee_limit(parts, self._space(parts))
        return spent is not None and spent.by_probes

    def _pass_of(self, parts: Parts, whole: Space) -> tuple[str, Measures]:
        """(the name of its first calibration pass, what it reads there itself)."""
        depth = len(self.session.dense.adapter.blocks(self.session.dense.model))
        first = instance(parts.allocator, "its first space", parts.allocator.first_space(whole), Space)
        return same_pass(parts, first, depth), Measures.of(parts, depth)

    def _space(self, parts: Parts) -> Space:
        dense = self.session.dense
        return whole_space(parts, dense.model, dense.adapter, dense.dtype)

    @contextmanager
    def make(self, parts: Parts, name: str) -> Iterator[Made]:
        """Run a recipe; within, the small model is there.

        Args:
            parts: of the recipe.
            name: of the trial or cell, by which its progress is told from that of others.

        Raises:
            WrongInput: there can be no such recipe.
        """
        with self.session.progress.part(name) as progress:
            progress.describe(reporting.settings(parts.recipe))
            yield from self._make(parts, replace(self.session, progress=progress))

    def _make(self, parts: Parts, session: Session) -> Iterator[Made]:
        shelf, folder = self.place / "walks", self.place / f"trial-{parts.digest[:16]}"
        for path in (shelf, folder):
            path.mkdir(exist_ok=True)
        whole, draws = self._space(parts), self._draw(parts)
        parts.objective.check(draws.search)
        if parts.learner is not None:
            parts.learner.check(draws.search)
        measures = None if parts.learner is not None else self._together.get(self._pass_of(parts, whole)[0])
        (run,) = session.start_runs(parts, [whole], draws, folder, shelf, Clock(), measures)
        searched, answer = run_search([run])[0]
        optimum = None
        if self.exact and parts.learner is None:
            judges = not parts.prices_alone(searched.depth)
            optimum = find_optimum(searched, parts.objective, answer, draws.search, parts.recipe.seed, judges=judges)
        net, plan = run.rebuild(searched, answer)
        small = assemble(net, plan, parts)
        finish_model(run, small, net, plan)
        yield Made(run, net, plan, small, draws, optimum)
        clear_folder(folder)
        self._tidy(shelf)

    def judge(self, parts: Parts, name: str, metrics: Collection[str]) -> dict[str, float]:
        """Run a recipe and measure it on the search text.

        Args:
            parts: of the recipe.
            name: of the trial.
            metrics: what is measured.

        Returns:
            The metrics, by name.

        Raises:
            WrongInput: there can be no such recipe.
        """
        with self.make(parts, name) as made:
            found: dict[str, float] = {"parameters": made.parameters, "seconds": sum(made.run.clock.seconds.values())}
            if {"perplexity", "loss"} & set(metrics):
                measured = perplexity(made.small, made.draws.search, progress=self.session.progress)
                found |= {"perplexity": measured.value, "loss": measured.nll}
            if "objective" in metrics:
                found["objective"] = made.objective
            made.run.progress.measured(found | {"token_forwards": made.run.ledger.tokens})
        return {metric: float(found[metric]) for metric in metrics}

    def _draw(self, parts: Parts) -> Draws:
        """The recipe's calibration tokens, and those it trains on; what judges is the same for all."""
        session, recipe, shared = self.session, parts.recipe, self.session.draws
        if recipe.data == session.parts.recipe.data and (shared.recovery is not None or not parts.learns):
            return shared
        tokenizer, few = session.dense.tokenizer, limits(session.dense.model)
        draws, recovery = draw(tokenizer, recipe.data, session.progress, seed=recipe.seed, **few), shared.recovery
        if parts.learns and recovery is None:  # from behind what is shared, however little of it this recipe reads
            calibration = max(draws.calibration.n_tokens, shared.calibration.n_tokens)
            spent = {"calibration_tokens": calibration, "search_tokens": shared.search.n_tokens}
            data = recipe.data.model_copy(update=spent)
            recovery = draw(tokenizer, data, session.progress, seed=recipe.seed, recovery=True, **few).recovery
        draws = replace(draws, search=replace(shared.search, lessons=recovery), recovery=recovery)
        for part in (draws.calibration, draws.recovery):
            if part is not None and overlap(part, shared.search):
                raise WrongInput("it learns from text that trials are compared on; give data.search_dataset")
        return draws

    def _tidy(self, shelf: Path) -> None:
        """Remove the passes that were not used for the longest time, until the rest fits."""
        passes = sorted(
            (one for kind in ("walk", "gradients", "fisher", "stream") for one in shelf.glob(f"{kind}-*")),
            key=lambda one: one.stat().st_mtime,
        )
        sizes = [sum(file.stat().st_size for file in one.rglob("*") if file.is_file()) for one in passes]
        total = sum(sizes)
        for one, size in zip(passes, sizes, strict=True):
            if total <= self.disk:
                break
            clear_folder(one)
            total -= size
