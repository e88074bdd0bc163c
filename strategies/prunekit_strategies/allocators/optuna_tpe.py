"""Optuna's tree-structured Parzen estimator in level space."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from warnings import catch_warnings, simplefilter

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from prunekit import Allocator, Problem, Query, Search, check_choices
from prunekit_strategies.allocators.probes import Source, started
from prunekit_strategies.allocators.unknowns import Unknowns


@dataclass(frozen=True)
class OptunaTPE(Allocator):
    """Model the good and the bad trials by two densities l(x) and g(x); try where l/g is largest.

    x are deviations from the lowest allocation on a table (see Probes), decoded to the exact budget (see Unknowns);
    allocations that were asked before answer from memory. The best few trials and the start are judged again on
    all tokens.

    Source: Watanabe, arXiv:2304.11127, multivariate; Bergstra et al., NeurIPS 2011, eq. 2 and 3.
    """

    trials: int = 200  # allocations to ask for
    batch: int = 4  # allocations per ask; the sampler takes those still out for bad ones
    tokens: int = 8_192  # to judge a trial on
    finalists: int = 4  # trials judged again on all tokens
    reach: float = 0.25  # largest deviation, share of a site's groups
    waves: int | None = None  # cosines over depth per kind of site instead of one unknown per site: for deep models
    warm_start: Source = "probes"  # the table whose optimum the search begins from

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.trials, self.batch, self.tokens, self.finalists) < 1 or not 0 < self.reach <= 1:
            raise ValueError("trials, batch, tokens and finalists are at least 1, reach is in 0..1")
        if self.waves is not None and self.waves < 0:
            raise ValueError(f"waves are counted from 0, not {self.waves}")

    def search(self, problem: Problem) -> Search:
        table = yield from started(problem, self.warm_start)
        unknowns = Unknowns(problem.space, problem.space.lowest(table), self.reach, self.waves)
        names = [f"x{j}" for j in range(unknowns.size)]
        box: dict[str, BaseDistribution] = {name: FloatDistribution(-1, 1) for name in names}
        with _quiet():
            sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=problem.seed)
            study = optuna.create_study(sampler=sampler)
        study.enqueue_trial(dict.fromkeys(names, 0.0))

        tokens = min(self.tokens, problem.tokens) or None
        start = problem.start
        heard = dict(zip([start], (yield [Query(start, tokens)]), strict=True))
        samples = 2 * self.trials  # those that decode to known allocations cost nothing, but end too
        while (size := min(self.batch, samples, self.trials - len(heard))) > 0:
            samples -= size
            with _quiet():
                out = [study.ask(box) for _ in range(size)]
            decoded = [unknowns.decode([trial.params[name] for name in names]) for trial in out]
            new = list(dict.fromkeys(a for a in decoded if a not in heard))
            if new:
                heard |= zip(new, (yield [Query(a, tokens) for a in new]), strict=True)
            for trial, allocation in zip(out, decoded, strict=True):
                loss = heard[allocation]
                state = TrialState.COMPLETE if math.isfinite(loss) else TrialState.FAIL
                study.tell(trial, loss if math.isfinite(loss) else None, state=state)

        finalists = list(dict.fromkeys([*sorted(heard, key=heard.__getitem__)[: self.finalists], start]))
        losses = yield [Query(a) for a in finalists]
        return min(zip(losses, finalists, strict=True))[1]


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines and no notes on experimental options; as it was, afterwards."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with catch_warnings():
            simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
