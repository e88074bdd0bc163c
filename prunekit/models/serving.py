"""Our model classes become known to vLLM, in every process of it: the entry point of its group `vllm.general_plugins`.

vLLM runs a model that it has no class for through the class of transformers. It finds that by two roads: the base model
by the Auto classes, and the causal class, by the name in the config, as an attribute of the module `transformers`.
Nothing here imports vLLM, and nothing in a model folder runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.models.classes import Family

REGISTRY = "vllm.model_executor.models.registry"  # where vLLM looks a causal class up


def register(families: Iterable[Family] | None = None) -> None:
    """Let vLLM serve `prunekit_*` models. May be called again, and in any process.

    Args:
        families: whose classes become known; None: all of prunekit's own.
    """
    from prunekit.models import classes

    families = tuple(classes.FAMILIES.values() if families is None else families)
    classes.register(families)
    # transformers puts another module object in its own place while it is loaded; who came early holds the first one
    modules = [sys.modules["transformers"], getattr(sys.modules.get(REGISTRY), "transformers", None)]
    for family in families:
        _, _, causal = classes.define(family)
        for module in modules:
            if module is not None:
                setattr(module, causal.__name__, causal)
