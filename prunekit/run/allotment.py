"""A time, shared out: text by the plan, before the work; search and recovery by the clock, during it.

What the clock decides goes on record, so that an interrupted run keeps it, and into the recipe beside the result, which
makes the same model without a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

from prunekit.data.spec import DataSpec
from prunekit.data.windows import DEFAULTS, JUDGED, LEAST, whole_windows
from prunekit.errors import WrongInput
from prunekit.recipe.resolve import Parts
from prunekit.run.plan.plan import HEARING, SEARCH, Plan, Stage
from prunekit.system.progress import span
from prunekit.system.rates import Rates

CALIBRATING = {(False, False): 1.0, (True, False): 0.5, (False, True): 0.35, (True, True): 0.25}
"""Share of the time until the search begins: (whether it asks for tokens, whether somebody trains) -> share."""
WELL, FIRST = 16_384, 0.8  # tokens of calibration that gain more than training does: the share that they may take of
# what the least leaves
RECOVERING = 0.5  # share that a search leaves to training
JUDGING = 0.1  # share of the time to measure both models on evaluation text, and half as much to judge the answer
MOST = 1 << 20  # tokens of a part: more are not read, whatever the time
WORK = 1.2  # passes and judging take so many times what is planned: plug-ins are guarded, memory is given back, and
# the rates are those of a loop of products alone
NEARLY = 1.1  # what takes at least so many times the time is refused
AROUND = 12.0  # seconds to start, and to load the result in a fresh process: twice what torch and transformers take
LEARNING = 4  # a token that is learnt takes so many times one that is judged: back, and the teacher
PASSES = ("gradients", "fisher", "prune", "rebuild")  # names of stages begin so
MODEL = (*PASSES, "evaluate", HEARING)  # what reads text with the model, but for searches


@dataclass(frozen=True, eq=False)
class Allotment:
    """How much of the time is left, as the work goes on."""

    seconds: float  # in all
    plan: Plan
    rates: Rates
    trains: bool  # whether somebody trains behind the search
    text: Mapping[str, int]  # part -> tokens, at most

    def search_tokens(self, spent: Mapping[str, float]) -> int:
        """Token-forwards that all searches may take, at least one.

        Args:
            spent: seconds by stage, when the first of them begins.
        """
        before = list(takewhile(lambda stage: not stage.name.startswith(SEARCH), self.plan.stages))
        behind = [stage for stage in self.plan.stages[len(before) :] if not stage.name.startswith(SEARCH)]
        pace = self._pace(spent, before)
        share = 1 - RECOVERING if self.trains else 1.0
        left = share * (self.seconds - AROUND - sum(spent.values()) - pace * self._of(behind))
        return max(1, round(left / pace * self.rates.flops / self.plan.forward))

    def training_seconds(self, spent: Mapping[str, float], trainers: int) -> float:
        """Seconds that the next of so many finishers that train may take.

        Args:
            spent: seconds by stage, when it begins.
            trainers: it, and those behind it.
        """
        exports = [stage for stage in self.plan.stages if stage.name.startswith("export")]
        judging = spent.get("evaluate", 0.0) / 3  # so far of both models and by the objective; it comes once more
        left = self.seconds - AROUND - sum(spent.values()) - judging - spent.get("sample", 0.0) - self._of(exports)
        return max(0.0, left) / trainers

    def __str__(self) -> str:
        """For the user."""
        stages = [stage for stage in self.plan.stages if stage.name.startswith(PASSES)]
        told = f"calibration on up to {self.text['calibration']:,} tokens, evaluation on {self.text['evaluation']:,}, "
        told += f"about {span(WORK * self._of(stages))} for passes over the model"
        return told + ", and what is left for recovery" * self.trains

    def _pace(self, spent: Mapping[str, float], before: Sequence[Stage]) -> float:
        """Seconds that a planned second takes, as far as passes over the model have shown it."""
        planned = self._of([stage for stage in before if stage.name.startswith(PASSES)])
        return spent.get("prune", 0.0) / planned if planned and spent.get("prune") else 1.0

    def _of(self, stages: Sequence[Stage]) -> float:
        return sum(stage.seconds(self.rates) or 0.0 for stage in stages)


def filled(data: DataSpec, most: Mapping[str, int]) -> DataSpec:
    """With the most of every part that leaves its amount open."""
    asked = {f"{part}_tokens": count for part, count in most.items()}
    return data.model_copy(update={key: count for key, count in asked.items() if getattr(data, key) is None})


def share_text(
    parts: Parts, seqlen: int, plan_of: Callable[[DataSpec], Plan], rates: Rates, planning: float = 0.0
) -> dict[str, int]:
    """How much text the recipe's time allows, of the parts whose amount nobody has said.

    Args:
        parts: of the recipe, which has a time.
        seqlen: tokens in a window.
        plan_of: the plan of the recipe with other data.
        rates: of this machine.
        planning: seconds that were spent on the plan before.

    Returns:
        Part -> tokens, as of `draw`'s `most`; there may be less text.

    Raises:
        WrongInput: the time is too short for the least that can be done.
    """
    data, time = parts.recipe.data, parts.recipe.time
    assert time is not None
    searches, free = parts.searches(1), dict(parts.amounts)
    least = whole_windows(LEAST, seqlen) * seqlen
    share = CALIBRATING[searches, parts.trains]

    def planned(tokens: Mapping[str, int]) -> Plan:
        return plan_of(filled(data, tokens))

    def most(part: str, enough: int, over: Callable[[Plan], float]) -> int:
        """Tokens of a part, of which so many are enough, for which no seconds are `over`; the least, if there are."""

        @cache
        def beyond(windows: int) -> float:
            return over(planned(free | {part: least + windows * seqlen}))

        fits, windows = 0, max(0, (enough - least) // seqlen) + 1  # beyond the least; so many are too many
        if windows > 1 and beyond(windows - 1) <= 0:
            return least + (windows - 1) * seqlen
        while windows - fits > 1:  # seconds are nearly a straight line of the tokens
            line = fits - beyond(fits) * (windows - 1 - fits) / ((beyond(windows - 1) - beyond(fits)) or 1.0)
            probe = min(max(math.floor(line), fits + 1), windows - 1)
            for count in (probe, probe + 1):
                if fits < count < windows:
                    fits, windows = (count, windows) if beyond(count) <= 0 else (fits, count)
        return least + fits * seqlen

    def seconds(plan: Plan) -> float:
        took = {stage: stage.seconds(rates) or 0.0 for stage in plan.stages}
        return planning + AROUND + sum(WORK * s if stage.name.startswith(MODEL) else s for stage, s in took.items())

    def judging(plan: Plan) -> float:
        return sum(stage.seconds(rates) or 0.0 for stage in plan.stages if stage.name.startswith(("evaluate", HEARING)))

    free |= {"calibration": least, "search": JUDGED if searches else least, "recovery": least}
    free["evaluation"] = most("evaluation", DEFAULTS["evaluation"], lambda plan: judging(plan) - JUDGING * time)
    if not searches:  # then the objective only says what the answer is worth
        free["search"] = most("search", JUDGED, lambda plan: judging(plan) - 1.5 * JUDGING * time)
    shortest = planned(free)
    if seconds(shortest) > NEARLY * time:
        raise WrongInput(
            f"{span(time)} are too short: recipe and model take about {span(seconds(shortest))} here at the least; "
            "give more --time" + ", or a recipe that does not search" * searches
        )
    free["calibration"] = most("calibration", MOST, lambda plan: seconds(plan) - share * time)
    if parts.trains and not searches and free["calibration"] < WELL:
        well = seconds(shortest) + FIRST * (time - seconds(shortest))
        free["calibration"] = most("calibration", WELL, lambda plan: seconds(plan) - max(well, share * time))
    learnt = (1 - share) * time * rates.flops / (LEARNING * shortest.forward)
    free["recovery"] = min(MOST, max(least, whole_windows(round(learnt), seqlen) * seqlen))
    return free
