"""The search of runs: calibration passes and conversations in turn, or a learner's lessons."""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.errors import PluginError
from prunekit.plugins.guard import instance
from prunekit.run.learn import run_learner
from prunekit.run.stages import Run
from prunekit.search.conversation import Known
from prunekit.search.supernet import Supernet
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation

MOST_PASSES = 32  # of calibration along ever finer ladders


def run_search(runs: Sequence[Run]) -> list[tuple[Supernet, Allocation]]:
    """Search each run's allocation: coarse to fine, as long as its allocator wants finer ladders.

    The runs differ in their budgets alone: a calibration pass along the rungs of all costs little more than along those
    of one, so every round has one; then each holds its own conversation on its own ladders, and what is known from
    another's is not judged again.

    Returns:
        For every run, the network that its last conversation was about, and the answer.
    """
    first, number, found = runs[0], 0, dict[Run, tuple[Supernet, Allocation]]()
    if first.parts.learner is not None:
        return run_learner(runs)
    allocator = first.parts.allocator
    spaces = {  # of those that still search
        run: instance(allocator, "its first space", allocator.first_space(run.whole), Space) for run in runs
    }
    centres = {run: run.whole.uniform() for run in runs}
    while spaces:
        starts = {run: space.nearest(centres[run]) for run, space in spaces.items()}
        every = next(iter(spaces.values())).joined(*spaces.values())
        middle = tuple(sorted(counts)[len(counts) // 2] for counts in zip(*starts.values(), strict=True))
        net = first.calibrate(every, middle, f"prune {number + 1}", first.clock.shared, search=number)
        known: Known = {}
        centres = {run: run.ask_allocator(net, spaces[run], starts[run], number, known) for run in spaces}
        finer = {run: allocator.next_space(space, centres[run]) for run, space in spaces.items()}
        found |= {run: (net, centres[run]) for run, space in finer.items() if space is None}
        spaces = {
            run: instance(allocator, "its next space", space, Space)
            for run, space in finer.items()
            if space is not None
        }
        number += 1
        if spaces and number >= MOST_PASSES:
            raise PluginError(f"{type(allocator).__name__} asks for yet another space after {number} passes")
        net.rest()  # the next pass needs the room
    return [found[run] for run in runs]
