"""Runs the recipes of a study on one open model and measures them on one text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from prunekit.data.draws import Draws, draw
from prunekit.data.tokens import overlap
from prunekit.errors import WrongInput
from prunekit.measure.perplexity import perplexity
from prunekit.models.opening import limits
from prunekit.recipe.resolve import Parts
from prunekit.report import document as reporting
from prunekit.run.clock import Clock
from prunekit.run.finish import finish_model
from prunekit.run.prune import run_search
from prunekit.run.session import Session
from prunekit.run.spaces import whole_space
from prunekit.run.stages import assemble, clear_folder


@dataclass(frozen=True, eq=False)
class Bench:
    """One model, one text to be compared on, and a shelf of calibration passes."""

    session: Session  # of the base recipe
    place: Path
    metrics: tuple[str, ...]
    disk: int  # bytes of the shelf

    def judge(self, parts: Parts) -> dict[str, float]:
        """Run a recipe.

        Returns:
            Its metrics, by name.

        Raises:
            WrongInput: there can be no such recipe.
        """
        session, dense, recipe = self.session, self.session.dense, parts.recipe
        shelf, folder = self.place / "walks", self.place / f"trial-{parts.digest[:16]}"
        for path in (shelf, folder):
            path.mkdir(exist_ok=True)
        whole, draws = whole_space(parts, dense.model, dense.adapter, dense.dtype), self._draw(parts)
        parts.objective.check(draws.search)
        (run,) = session.start_runs(parts, [whole], draws, folder, shelf, Clock())
        net, plan = run.rebuild(*run_search([run])[0])
        small = assemble(net, plan, parts)
        finish_model(run, small, net, plan)
        kept = reporting.count(small)
        if not parts.form.shrinks:
            single = reporting.weights(small, net, plan, recipe.structure)
            kept -= single["in_linear_maps"] - single["not_zero"]
        found: dict[str, float] = {"parameters": kept, "seconds": sum(run.clock.seconds.values())}
        if {"perplexity", "loss"} & set(self.metrics):
            measured = perplexity(small, draws.search, progress=session.progress)
            found |= {"perplexity": measured.value, "loss": measured.nll}
        if "objective" in self.metrics:
            found["objective"] = net.loss(parts.objective, plan, draws.search)
        clear_folder(folder)
        self._tidy(shelf)
        return {metric: float(found[metric]) for metric in self.metrics}

    def _draw(self, parts: Parts) -> Draws:
        """The recipe's calibration tokens, and those it trains on; what judges is the same for all."""
        session, recipe, shared = self.session, parts.recipe, self.session.draws
        if recipe.data == session.parts.recipe.data and (shared.recovery is not None or not parts.learns):
            return shared
        dense = session.dense
        draws = draw(
            dense.tokenizer, recipe.data, session.progress,
            seed=recipe.seed, recovery=parts.learns, **limits(dense.model),
        )  # fmt: skip
        recovery = shared.recovery or draws.recovery
        draws = replace(draws, search=replace(shared.search, lessons=recovery), recovery=recovery)
        for part in (draws.calibration, draws.recovery):
            if part is not None and overlap(part, shared.search):
                raise WrongInput("it learns from text that trials are compared on; give data.search_dataset")
        return draws

    def _tidy(self, shelf: Path) -> None:
        """Remove the passes that were not used for the longest time, until the rest fits."""
        passes = sorted(
            (one for kind in ("walk", "gradients", "fisher") for one in shelf.glob(f"{kind}-*")),
            key=lambda one: one.stat().st_mtime,
        )
        sizes = [sum(file.stat().st_size for file in one.rglob("*") if file.is_file()) for one in passes]
        total = sum(sizes)
        for one, size in zip(passes, sizes, strict=True):
            if total <= self.disk:
                break
            clear_folder(one)
            total -= size
