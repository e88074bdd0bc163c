"""Optuna's tree-structured Parzen estimator in level space."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from warnings import catch_warnings, simplefilter

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from prunekit_strategies.allocators.unknowns import Ask, Sampled, Tell


@dataclass(frozen=True)
class OptunaTPE(Sampled):
    """Model the good and the bad trials by two densities l(x) and g(x); try where l/g is largest.

    x are deviations from the lowest allocation on a table (see Probes), decoded to the exact budget (see Unknowns);
    allocations that were asked before answer from memory. The best few trials and the start are judged again on
    all tokens.

    Source: Watanabe, arXiv:2304.11127, multivariate; Bergstra et al., NeurIPS 2011, eq. 2 and 3.
    """

    samples: ClassVar[int] = 2

    def opened(self, size: int, seed: int) -> tuple[Ask, Tell]:
        names = [f"x{j}" for j in range(size)]
        box: dict[str, BaseDistribution] = {name: FloatDistribution(-1, 1) for name in names}
        with _quiet():
            # those still out count as bad ones
            sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
            study = optuna.create_study(sampler=sampler)
        study.enqueue_trial(dict.fromkeys(names, 0.0))

        @_quiet()
        def ask(count: int) -> list[tuple[Any, Sequence[float]]]:
            trials = [study.ask(box) for _ in range(count)]
            return [(trial, [trial.params[name] for name in names]) for trial in trials]

        def tell(found: list[tuple[Any, float]]) -> None:
            for trial, loss in found:
                state = TrialState.COMPLETE if math.isfinite(loss) else TrialState.FAIL
                study.tell(trial, loss if math.isfinite(loss) else None, state=state)

        return ask, tell


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
