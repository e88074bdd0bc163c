"""What comparisons with released code share: a model with what its maps receive, and functions out of their files."""

from __future__ import annotations

import ast
import math
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from prunekit import LayerProblem
from prunekit.data.tokens import TokenBatch
from prunekit.layer.problem import Producer

ATTENTION, MLP = ("o_proj", "q_proj", "k_proj", "v_proj"), ("down_proj", "gate_proj", "up_proj")
Rows = Iterator[tuple[str, str]]


def taken(file: Path, *names: str, changes: Mapping[str, str] = types.MappingProxyType({}), **there: Any) -> Any:
    """Classes and functions of a file, as they are but for `changes` of its text, in a module that knows `there`."""
    text = file.read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    found = [node for node in ast.parse(text).body if getattr(node, "name", None) in names]
    if missing := set(names) - {getattr(node, "name", "") for node in found}:
        raise typer.BadParameter(f"{file} has no {', '.join(sorted(missing))}; clone the repository anew")
    module = types.ModuleType(f"released_{file.parent.name}_{file.stem}")
    sys.modules[module.__name__] = module
    vars(module).update({"torch": torch, "nn": nn, "math": math, "F": F, "sys": sys, **there})
    lines = "from __future__ import annotations\n" + "\n\n".join(ast.unparse(node) for node in found)
    exec(compile(lines, str(file), "exec"), vars(module))
    return module


def apart(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def shares(count: Tensor, of: float) -> str:
    return f"{float(count) / of:.2%}"


def corr(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@dataclass(eq=False)
class World:
    """A model in float32, calibration text, and what every linear map receives."""

    model: Any
    tokens: TokenBatch
    evaluation: TokenBatch

    @cached_property
    def maps(self) -> dict[str, nn.Linear]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """(tokens, d_in) in float64, by name of the map."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self.maps}

        def catch(into: list[Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> None:
            into.append(args[0].detach().flatten(0, -2).double())

        hooks = [m.register_forward_pre_hook(partial(catch, seen[n])) for n, m in self.maps.items()]
        with torch.no_grad():
            for ids in self.tokens.ids:
                self.model(ids[None])
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(parts) for name, parts in seen.items()}

    @property
    def windows(self) -> tuple[int, int]:
        return len(self.tokens), self.tokens.seqlen

    def layer(self, name: str, **options: Any) -> LayerProblem:
        x, weight = self.inputs[name], options.pop("weight", self.maps[name].weight.detach())
        return LayerProblem(weight, x.T @ x / len(x), **options)

    def sub_layer(self, block: int, names: tuple[str, ...]) -> LayerProblem:
        """The map that is cut, and those in front of it."""
        path = {n.rsplit(".", 1)[-1]: n for n in self.maps if f".layers.{block}." in n}
        first, *others = (path[n] for n in names)
        front = tuple(
            Producer(n, self.maps[n].weight.detach(), {"power": self.inputs[n].square().mean(0)}) for n in others
        )
        group = 1 if names is MLP else self.maps[first].in_features // self.model.config.num_key_value_heads
        return self.layer(first, producers=front, group_size=group)

    @torch.no_grad()
    def perplexity(self, weights: Mapping[str, Tensor]) -> float:
        """With these weights in the place of its own."""
        own = {name: self.maps[name].weight.detach().clone() for name in weights}
        for name, weight in weights.items():
            self.maps[name].weight.copy_(weight)
        loss = sum(float(self.model(ids[None], labels=ids[None]).loss) for ids in self.evaluation.ids)
        for name, weight in own.items():
            self.maps[name].weight.copy_(weight)
        return math.exp(loss / len(self.evaluation))
