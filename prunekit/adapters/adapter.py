"""Where a model can be cut, what goes with each cut, and how it is made.

A family of transformers is data: `modeling.Family` names its parts. Sites, prices, slices and dropped
sub-layers follow from the names and from the shapes of the modules.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from prunekit.errors import WrongInput
from prunekit.layer import Candidate
from prunekit.modeling import Family, Part, SkippedMixer, SkippedMLP, recount
from prunekit.registry import ADAPTERS, UnknownName
from prunekit.sites import Site, Structure

Heads = Literal["kv", "query"]
M = TypeVar("M", bound=nn.Module)
PARTS: tuple[Part, ...] = get_args(Part)  # in order of execution


class UnsupportedModel(WrongInput):
    """A model no adapter knows, or one whose shape its adapter cannot cut."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Rows (dim 0, biases with them) or columns (dim 1) of one linear map, by group."""

    path: str  # of the linear map inside its block
    dim: Literal[0, 1]
    index: Tensor  # (n_groups, width): which rows or columns go with each group


@dataclass(frozen=True)
class ModelAdapter(ABC):
    """What the road asks of a model: its blocks, and their linear maps in order of execution.

    `block` below is one of `model`. Single weights can be removed in every family; groups, and with them whole
    sub-layers, where the family says how.
    """

    layers: ClassVar[str]  # path of the list of blocks

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks, in order of execution."""
        found = model.get_submodule(self.layers)
        assert isinstance(found, nn.ModuleList)
        return found

    def sites(self, model: nn.Module, heads: Heads = "kv") -> tuple[Site, ...]:
        """All sites where groups are removed, in order of execution. Heads go by whole KV groups, or evenly from every
        KV group; where every KV head has one query head, the two are the same.

        Raises:
            UnsupportedModel: the family has no groups, or a linear map is not a plain one, say because the model is
                quantized.
        """
        name = getattr(model.config, "model_type", type(model).__name__)
        raise UnsupportedModel(
            f"models of type {name!r} have no groups that can be cut out; "
            "remove single weights with structure weights or a pattern N:M, such as 2:4"
        )

    def linear_sites(self, model: nn.Module, structure: Structure) -> tuple[Site, ...]:
        """Every linear map of every block as a site where single weights are removed, in order of execution.

        Raises:
            UnsupportedModel: a linear map is not a plain one, or its rows are no whole number of pattern blocks.
        """
        return tuple(
            self._linear_site(block, index, path, shared, structure)
            for index, block in enumerate(self.blocks(model))
            for shared in self.stages(block)
            for path in shared
        )

    @abstractmethod
    def stages(self, block: nn.Module) -> list[tuple[str, ...]]:
        """Paths of all linear maps of a block in order of execution; those that receive the same input together."""

    @abstractmethod
    def part(self, site: Site) -> str | None:
        """The sub-layer of the block whose output is that of the site's linear map; None: it feeds another map."""

    @abstractmethod
    def holder(self, site: Site) -> str | None:
        """Path in a block of the module whose output is that of the site's linear map; None: there is none."""

    @abstractmethod
    def adds_up(self, block: nn.Module) -> bool:
        """Whether a block is its input plus its sub-layers' outputs; not where a norm comes after the sum."""

    @abstractmethod
    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """What the model makes of the last block's output: (..., d) -> (..., vocabulary)."""

    def exposed(self, block: nn.Module) -> AbstractContextManager[None]:
        """Within, a run of `block` calls every linear map, so that hooks see what each receives."""
        return nullcontext()

    def path(self, site: Site) -> str:
        """Path in a block of the linear map that `site` cuts."""
        return site.name.removeprefix(f"{self.layers}.{site.block}.")

    def linear(self, block: nn.Module, site: Site) -> nn.Linear:
        """The linear map whose input columns `site` cuts."""
        return _linear(block, self.path(site))

    def maps(self, block: nn.Module, site: Site) -> list[nn.Linear]:
        """The linear maps a group goes through, the one whose columns it cuts last; of single weights, their own."""
        return [self.linear(block, site)]

    def cuts(self, block: nn.Module, site: Site) -> Sequence[Cut]:
        """Everything a group of `site` takes along; the last one cuts the columns of the site's own linear map."""
        return (Cut(self.path(site), 1, torch.arange(site.d_in)[:, None]),)

    def pruned(self, block: nn.Module, site: Site, candidate: Candidate) -> dict[str, nn.Module]:
        """The modules of `block` that change, by path, cut to the candidate; `block` itself stays as it is.

        What is not cut is shared with `block`: norms, activations, rotary tables. Where single weights were removed,
        the linear map keeps its shape and has zeros.
        """
        return {self.path(site): reweighted(self.linear(block, site), candidate.weight)}

    def remove(self, model: nn.Module, site: Site, candidate: Candidate) -> None:
        """Cut a candidate out of the model, in place."""
        block = self.blocks(model)[site.block]
        for path, module in self.pruned(block, site, candidate).items():
            block.set_submodule(path, module)

    def with_bias(self, model: nn.Module, site: Site) -> Site:
        """The site when its linear map has a bias, which goes with the sub-layer; the same where it has one."""
        linear = self.linear(self.blocks(model)[site.block], site)
        return site if linear.bias is not None else replace(site, params_fixed=site.params_fixed + linear.out_features)

    def _linear_site(
        self, block: nn.Module, index: int, path: str, shared: tuple[str, ...], structure: Structure
    ) -> Site:
        prefix = f"{self.layers}.{index}"
        name = f"{prefix}.{path}"
        _check_plain(block, path, name)
        linear = _linear(block, path)
        d_in, d_out = linear.in_features, linear.out_features
        if structure.block and d_in % structure.block:
            raise UnsupportedModel(
                f"{name} has rows of {d_in} weights, which are no whole blocks of {structure.block}; "
                "choose a pattern N:M whose M divides them, or structure weights"
            )
        step = structure.step(d_in)
        least = step if structure.block else 0  # a pattern keeps something of every block
        return Site(
            name, index, "linear", d_in, 1, d_out,
            least=least, step=step, pattern=structure.block, shares=f"{prefix}.{shared[0]}" if len(shared) > 1 else "",
        )  # fmt: skip


@dataclass(frozen=True)
class Transformer(ModelAdapter):
    """A family whose blocks are attention and an MLP: heads and neurons are groups, sub-layers can be dropped.

    A family sets the class variables; it overrides `cuts` when its rows are laid out in a way `Family.rows` cannot say.
    """

    family: ClassVar[Family]
    final: ClassVar[tuple[str, ...]]  # modules after the last block, in order; absent ones are passed over

    def sites(self, model: nn.Module, heads: Heads = "kv") -> tuple[Site, ...]:
        return tuple(
            self._site(block, index, part, heads)
            for index, block in enumerate(self.blocks(model))
            for part in PARTS
            if part not in self.dropped(block)
        )

    def stages(self, block: nn.Module) -> list[tuple[str, ...]]:
        stages: list[tuple[str, ...]] = []
        for part in PARTS:
            if part not in self.dropped(block):
                stages += [self._fed(part), (self.family.columns[part],)]
        return stages

    def part(self, site: Site) -> Part | None:
        path = self.path(site)
        return next((part for part in PARTS if self.family.columns[part] == path), None)

    def holder(self, site: Site) -> str | None:
        part = self.part(site)
        return None if part is None else self.family.attention if part == "attention" else self.family.mlp

    def adds_up(self, block: nn.Module) -> bool:
        return self.family.has_norms_first(block)

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        for path in self.final:
            parent, _, name = path.rpartition(".")
            if (module := getattr(model.get_submodule(parent), name)) is not None:
                hidden = module(hidden)
        return hidden

    def path(self, site: Site) -> str:
        if site.kind == "linear":
            return super().path(site)
        return self.family.columns[site.kind]

    def maps(self, block: nn.Module, site: Site) -> list[nn.Linear]:
        if site.kind == "linear":
            return super().maps(block, site)
        part = _part(site)
        return [_linear(block, path) for path in (*self._fed(part), self.family.columns[part])]

    def pruned(self, block: nn.Module, site: Site, candidate: Candidate) -> dict[str, nn.Module]:
        if site.kind == "linear":
            return super().pruned(block, site, candidate)
        if candidate.kept is None:
            raise ValueError(f"{site.name}: only candidates with groups can be cut out")
        if not candidate.kept:
            return self._stubs(block, site)
        kept = torch.tensor(candidate.kept)
        *fed, own = self.cuts(block, site)
        # ascending, because query head h reads KV head h // n_rep also where a group is spread over all of them
        changed = {cut.path: sliced(_linear(block, cut.path), cut.dim, _rows(cut, kept)) for cut in fed}
        columns = _rows(own, kept)
        changed[own.path] = sliced(_linear(block, own.path), 1, columns, source=candidate.weight)
        if (holder := self.holder(site)) is None:
            return dict(changed)
        inside = {path.removeprefix(f"{holder}."): module for path, module in changed.items()}
        whole = grafted(block.get_submodule(holder), inside)
        if site.kind == "attention":
            query, kv, _ = self.heads(block)
            count = len(candidate.kept)
            recount(whole, *((count * kv, kv) if _by_query(site, kv) else (count * (query // kv), count)))
        return {holder: whole}

    # -- how a block is made ---------------------------------------------------------------------------

    def cuts(self, block: nn.Module, site: Site) -> Sequence[Cut]:
        if site.kind == "linear":
            return super().cuts(block, site)
        own = torch.tensor(site.columns(range(site.n_groups))).reshape(site.n_groups, -1)
        if site.kind == "mlp":
            index = {"width": own}
        else:
            _, kv, width = self.heads(block)
            index = {"query": own}
            if not _by_query(site, kv):  # by query head, keys and values stay: each still has readers
                index |= {"kv": torch.arange(kv * width).reshape(kv, -1)}
                index |= {"qkv": torch.arange(3 * kv * width).reshape(kv, -1)}  # q, k, v side by side in every head
        fed = [Cut(path, 0, index[unit]) for path, unit in self.family.rows.items() if unit in index]
        return *fed, Cut(self.family.columns[_part(site)], 1, own)

    def heads(self, block: nn.Module) -> tuple[int, int, int]:
        """(query heads, KV heads, head width) of the block's attention, read from its modules."""
        width = self.head_dim(block)
        query = _linear(block, self.family.columns["attention"]).in_features // width
        keys = next((path for path, unit in self.family.rows.items() if unit == "kv"), None)
        return query, query if keys is None else _linear(block, keys).out_features // width, width

    def head_dim(self, block: nn.Module) -> int:
        """Width of a head, which pruning never changes."""
        attention = block.get_submodule(self.family.attention)
        return int(getattr(attention, "head_dim" if isinstance(attention, SkippedMixer) else self.family.head_dim))

    def dropped(self, block: nn.Module) -> tuple[Part, ...]:
        """The parts of a block that were dropped."""
        mlp = block.get_submodule(self.family.mlp or self.family.columns["mlp"])
        gone = isinstance(block.get_submodule(self.family.attention), SkippedMixer), isinstance(mlp, SkippedMLP)
        return tuple(part for part, is_gone in zip(PARTS, gone, strict=True) if is_gone)

    def biased(self, block: nn.Module) -> tuple[Part, ...]:
        """The parts of a block whose linear map with cut columns has a bias."""
        there: list[Part] = [part for part in PARTS if part not in self.dropped(block)]
        return tuple(part for part in there if _linear(block, self.family.columns[part]).bias is not None)

    def layer_config(self, block: nn.Module) -> dict[str, Any]:
        """Sizes of a (pruned) block as an entry of `per_layer_config`; `skip` lists dropped parts."""
        family, dropped = self.family, self.dropped(block)
        entry: dict[str, Any] = {"skip": list(dropped)} if dropped else {}
        query, kv = (1, 1) if "attention" in dropped else self.heads(block)[:2]  # a stub caches one head
        entry[family.query_heads] = query
        if family.kv_heads is not None:
            entry[family.kv_heads] = kv
        if "mlp" not in dropped:
            entry[family.width] = _linear(block, family.columns["mlp"]).in_features
        return entry

    # -- inside ------------------------------------------------------------------------------------------

    def _site(self, block: nn.Module, index: int, part: Part, heads: Heads) -> Site:
        path = self.family.columns[part]
        name = f"{self.layers}.{index}.{path}"
        for each in (path, *self.family.rows):
            if each.startswith(f"{self.family.attention}.") == (part == "attention"):
                _check_plain(block, each, name)
        columns = _linear(block, path).in_features
        n_groups, spread, cached = columns, 1, 0
        if part == "attention":
            query, kv, width = self.heads(block)
            if query % kv:
                raise UnsupportedModel(f"{name}: {query} query heads do not share {kv} KV heads evenly")
            by_query = heads == "query" and query > kv
            n_groups, spread, cached = (query // kv, kv, 0) if by_query else (kv, 1, 2 * width)
        site = Site(name, index, part, n_groups, columns // n_groups, 0, cached_per_group=cached, spread=spread)
        each = sum(_per_group(block, cut) for cut in self.cuts(block, site))
        gone = (block.get_submodule(path) for path in self._stubs(block, site))
        total = sum(p.numel() for module in gone for p in module.parameters())
        return replace(site, params_per_group=each, params_fixed=total - n_groups * each)

    def _fed(self, part: Part) -> tuple[str, ...]:
        """The linear maps in front of the one whose columns are cut."""
        inside = f"{self.family.attention}."
        return tuple(path for path in self.family.rows if path.startswith(inside) == (part == "attention"))

    def _stubs(self, block: nn.Module, site: Site) -> dict[str, nn.Module]:
        return self.family.skipped(block, _part(site), site.block, self.head_dim(block))


def adapter_for(model_type: str) -> ModelAdapter:
    """The adapter of a `config.model_type`; pruned models of prunekit go by their family.

    Raises:
        UnsupportedModel: none is registered; lists those that are.
    """
    try:
        return ADAPTERS.build(model_type.removeprefix("prunekit_"))
    except UnknownName:
        there = ", ".join(ADAPTERS)
        raise UnsupportedModel(f"model type {model_type!r} has no adapter; supported are {there}") from None


def sliced(linear: nn.Linear, dim: Literal[0, 1], index: Tensor, source: Tensor | None = None) -> nn.Linear:
    """A linear map of the chosen rows or columns; `source` is sliced in place of its weight."""
    weight, bias = linear.weight, linear.bias
    picked = (weight if source is None else source).detach()
    picked = picked.index_select(dim, index.to(picked.device)).to(weight)
    small = nn.Linear(picked.shape[1], picked.shape[0], bias=bias is not None, device="meta")
    small.weight = nn.Parameter(picked, weight.requires_grad)
    if bias is not None:
        kept = bias.detach().index_select(0, index.to(bias.device)) if dim == 0 else bias.detach().clone()
        small.bias = nn.Parameter(kept, bias.requires_grad)
    return small.train(linear.training)


def reweighted(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """A linear map of the same shape with another weight; it shares the bias."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight = nn.Parameter(weight.detach().to(linear.weight), linear.weight.requires_grad)
    other.bias = linear.bias
    return other.train(linear.training)


def shallow(module: M) -> M:
    """A copy of the module tree that shares every parameter, buffer and config."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    memo |= {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    return copy.deepcopy(module, memo)


def grafted(module: M, changed: Mapping[str, nn.Module]) -> M:
    """The module with other modules at some paths, itself as it was: whatever is not on the way to them is shared."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    inside: dict[str, dict[str, nn.Module]] = {}
    for path, other in changed.items():
        name, _, rest = path.partition(".")
        if rest:
            inside.setdefault(name, {})[rest] = other
        else:
            twin._modules[name] = other
    for name, below in inside.items():
        twin._modules[name] = grafted(module.get_submodule(name), below)
    return twin


def _linear(block: nn.Module, path: str) -> nn.Linear:
    found = block.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


def _check_plain(block: nn.Module, path: str, name: str) -> None:
    found = block.get_submodule(path)
    if not isinstance(found, nn.Linear) or not found.weight.is_floating_point():
        raise UnsupportedModel(
            f"{name} needs plain linear maps, but {path} is {type(found).__name__}; prune before quantizing or wrapping"
        )


def _part(site: Site) -> Part:
    assert site.kind != "linear"
    return site.kind


def _by_query(site: Site, kv_heads: int) -> bool:
    """Whether the groups of an attention site are query heads inside KV groups."""
    return site.spread > 1 or (kv_heads == 1 and site.n_groups > 1)


def _rows(cut: Cut, kept: Tensor) -> Tensor:
    return cut.index[kept].flatten().sort().values


def _per_group(block: nn.Module, cut: Cut) -> int:
    linear = _linear(block, cut.path)
    width, other = cut.index.shape[1], linear.weight.shape[1 - cut.dim]
    return width * other + (width if cut.dim == 0 and linear.bias is not None else 0)
