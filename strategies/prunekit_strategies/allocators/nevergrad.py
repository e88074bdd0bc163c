"""Any optimizer of Nevergrad, by name, in level space."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar
from warnings import catch_warnings, filterwarnings, simplefilter

import nevergrad as ng
import numpy as np
from nevergrad.common.errors import NevergradWarning

from prunekit_strategies.allocators.unknowns import Ask, Sampled, Tell


@dataclass(frozen=True)
class NevergradSearch(Sampled):
    """Ask a gradient-free optimizer where to look, tell it what was found.

    x are deviations from the lowest allocation on a table (see Probes), decoded to the exact budget (see Unknowns);
    allocations that were asked before answer from memory and do not count. The best few and the start are judged
    again on all tokens.

    Source: Bennet et al., Nevergrad: black-box optimization platform, SIGEVOlution 14(1), 2021.
    """

    samples: ClassVar[int] = 4

    optimizer: str = "DiscreteOnePlusOne"  # a name in nevergrad.optimizers.registry
    batch: int = 8  # allocations per ask

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ng.optimizers.registry
        if self.optimizer not in known:
            near = get_close_matches(self.optimizer, known, n=5) or sorted(known)[:5]
            raise ValueError(f"no optimizer {self.optimizer!r}; {len(known)} there are, such as {', '.join(near)}")

    def opened(self, size: int, seed: int) -> tuple[Ask, Tell]:
        with _contained():
            x = ng.p.Array(init=np.zeros(size)).set_bounds(-1, 1)
            x.random_state = np.random.RandomState(seed)
            known, samples = ng.optimizers.registry, self.samples * self.trials
            optimizer = known[self.optimizer](x, budget=samples, num_workers=self.batch)
            optimizer.suggest(np.zeros(size))

        @_contained()
        def ask(count: int) -> list[tuple[Any, Sequence[float]]]:
            points = [optimizer.ask() for _ in range(count)]
            return [(point, point.value.tolist()) for point in points]

        @_contained()
        def tell(found: list[tuple[Any, float]]) -> None:
            for point, loss in found:
                optimizer.tell(point, loss)

        return ask, tell


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
