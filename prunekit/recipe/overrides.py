"""What is said beside a recipe: KEY=VALUE, targets, families of sparsities. All of it is plain values.

What options a plug-in has is not known here: `resolve` refuses those that it does not have.
"""

from __future__ import annotations

PLUGINS = ("pruner", "allocator", "objective", "engine")  # keys with one plug-in each
LISTS = {"finishers": "finisher", "exporters": "exporter"}  # keys with several in turn
