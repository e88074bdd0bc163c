"""The plan of a run that tries several shares of the residual width, one search after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prunekit.run.plan.plan import HEARING, Plan, Stage

ONCE = ("open", "width", HEARING)  # stages that all shares have in common
RESULT = ("finish", "evaluate", "sample", "export")  # stages of the one that wins


def plan_shares(plans: Mapping[float, Plan], judged: int) -> Plan:
    """Join the plans of all shares: the searches of each, in turn, and one result, of the share that takes most.

    Args:
        plans: by share, ascending.
        judged: tokens that the result of every search is judged on.
    """
    hungriest = max(plans.values(), key=lambda plan: plan.least)

    def worst(name: str) -> list[Stage]:
        """Of a stage that all have, or some, the hungriest; nothing where none has it."""
        there = [stage for plan in plans.values() for stage in plan.stages if stage.name == name]
        return [max(there, key=lambda stage: (stage.memory, stage.disk))] if there else []

    stages = [stage for name in ONCE for stage in worst(name)]
    for share, plan in plans.items():
        own = [stage for stage in plan.stages if stage.name not in (*ONCE, *RESULT)]
        stages += [replace(stage, name=f"{stage.name} at share {share:g}") for stage in own]
        stages += [
            Stage(f"judge share {share:g}", stage.memory, stage.shared, read=stage.read, flops=judged * plan.forward)
            for stage in plan.stages
            if stage.name == "evaluate"
        ]
    return replace(hungriest, stages=(*stages, *(stage for name in RESULT for stage in worst(name))))
