"""Any optimizer of Nevergrad, by name, in level space."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from warnings import catch_warnings, filterwarnings, simplefilter

import nevergrad as ng
import numpy as np
from nevergrad.common.errors import NevergradWarning

from prunekit import Allocator, Problem, Query, Search, check_choices
from prunekit_strategies.allocators.probes import Source, started
from prunekit_strategies.allocators.unknowns import Unknowns


@dataclass(frozen=True)
class NevergradSearch(Allocator):
    """Ask a gradient-free optimizer where to look, tell it what was found.

    x are deviations from the lowest allocation on a table (see Probes), decoded to the exact budget (see Unknowns);
    allocations that were asked before answer from memory and do not count. The best few and the start are judged
    again on all tokens.

    Source: Bennet et al., Nevergrad: black-box optimization platform, SIGEVOlution 14(1), 2021.
    """

    optimizer: str = "DiscreteOnePlusOne"  # a name in nevergrad.optimizers.registry
    trials: int = 200  # allocations to ask for
    batch: int = 8  # allocations per ask
    tokens: int = 8_192  # to judge a trial on
    finalists: int = 4  # trials judged again on all tokens
    reach: float = 0.25  # largest deviation, share of a site's groups
    waves: int | None = None  # cosines over depth per kind of site instead of one unknown per site: for deep models
    warm_start: Source = "probes"  # the table whose optimum the search begins from

    def __post_init__(self) -> None:
        check_choices(self)
        known = ng.optimizers.registry
        if self.optimizer not in known:
            near = get_close_matches(self.optimizer, known, n=5) or sorted(known)[:5]
            raise ValueError(f"no optimizer {self.optimizer!r}; {len(known)} there are, such as {', '.join(near)}")
        if min(self.trials, self.batch, self.tokens, self.finalists) < 1 or not 0 < self.reach <= 1:
            raise ValueError("trials, batch, tokens and finalists are at least 1, reach is in 0..1")
        if self.waves is not None and self.waves < 0:
            raise ValueError(f"waves are counted from 0, not {self.waves}")

    def search(self, problem: Problem) -> Search:
        table = yield from started(problem, self.warm_start)
        unknowns = Unknowns(problem.space, problem.space.lowest(table), self.reach, self.waves)
        samples = 4 * self.trials  # those that decode to known allocations cost nothing, but end too
        with _contained():
            x = ng.p.Array(init=np.zeros(unknowns.size)).set_bounds(-1, 1)
            x.random_state = np.random.RandomState(problem.seed)
            optimizer = ng.optimizers.registry[self.optimizer](x, budget=samples, num_workers=self.batch)
            optimizer.suggest(np.zeros(unknowns.size))

        tokens = min(self.tokens, problem.tokens) or None
        start = problem.start
        heard = dict(zip([start], (yield [Query(start, tokens)]), strict=True))
        while (size := min(self.batch, samples, self.trials - len(heard))) > 0:
            samples -= size
            with _contained():
                out = [optimizer.ask() for _ in range(size)]
            decoded = [unknowns.decode(point.value.tolist()) for point in out]
            new = list(dict.fromkeys(a for a in decoded if a not in heard))
            if new:
                heard |= zip(new, (yield [Query(a, tokens) for a in new]), strict=True)
            with _contained():
                for point, allocation in zip(out, decoded, strict=True):
                    optimizer.tell(point, heard[allocation])

        finalists = list(dict.fromkeys([*sorted(heard, key=heard.__getitem__)[: self.finalists], start]))
        losses = yield [Query(a) for a in finalists]
        return min(zip(losses, finalists, strict=True))[1]


@contextmanager
def _contained() -> Iterator[None]:
    """No advice for those who choose its settings, and the global random state as it was: Nevergrad draws from it."""
    state = np.random.get_state()
    try:
        with catch_warnings():
            simplefilter("ignore", NevergradWarning)
            filterwarnings("ignore", "Could not import matplotlib")  # from cma
            yield
    finally:
        np.random.set_state(state)
