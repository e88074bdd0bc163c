"""Where a model can be cut, what goes with each cut, and how it is made.

A family of transformers is data: `classes.Family` names its parts. Sites, prices, slices and dropped
sub-layers follow from the names and from the shapes of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor, nn

from prunekit.layer.candidates import Candidate
from prunekit.models.classes import (
    Family,
    LowRank,
    NarrowHeads,
    NarrowValues,
    Part,
    Patched,
    SkippedMixer,
    SkippedMLP,
    SkippedState,
    TokenMixer,
    Unit,
    depthwise,
    patched,
)
from prunekit.models.modules import factored, grafted, low_rank, narrowed_heads, sliced
from prunekit.plugins.adapter import Cut, Heads, ModelAdapter, UnsupportedModel, check_plain, linear_at
from prunekit.space.forms import RANKS, Values
from prunekit.space.sites import Site

PARTS: tuple[Part, ...] = get_args(Part)  # in order of execution


@dataclass(frozen=True)
class Transformer(ModelAdapter):
    """A family whose blocks are attention and an MLP: heads and neurons are groups, sub-layers can be dropped.

    In hybrid families some blocks have another mixer in the place of attention, whose units are groups.

    A family sets the class variables; it overrides `cuts` when its rows are laid out in a way `Family.rows` cannot say.
    """

    family: ClassVar[Family]
    layers = "model.layers"
    factors = True
    final: ClassVar[tuple[str, ...]] = (
        "model.norm",
        "lm_head",
    )  # modules after the last block, in order; absent ones are passed over

    def family_of(self, config: Any) -> Family:
        """The family whose classes hold the language model of a model, by the config of all of it."""
        return self.family

    def sites(self, model: nn.Module, heads: Heads = "kv") -> tuple[Site, ...]:
        return tuple(
            site
            for index, block in enumerate(self.blocks(model))
            for part in self.left(block)
            for site in self.sites_in(block, index, part, heads)
        )

    def stages(self, block: nn.Module) -> list[tuple[str, ...]]:
        stages: list[tuple[str, ...]] = []
        for part in self.left(block):
            stages += [self.family.producers(part), (self.family.columns[part],)]
        return stages

    def linear(self, block: nn.Module, site: Site) -> nn.Linear:
        if site.form == RANKS or (site.form.coupled and self.path(site) == self.family.columns.get("attention")):
            found = block.get_submodule(self.path(site))
            if isinstance(found, LowRank | NarrowHeads):  # of a small model, to be run and listened to
                return cast(nn.Linear, found)
        return super().linear(block, site)

    def part(self, site: Site) -> Part | None:
        path = self.path(site)
        return next((part for part in PARTS if self.family.columns.get(part) == path), None)

    def holder(self, site: Site) -> str | None:
        part, family = self.part(site), self.family
        mixer = None if family.mixer is None else family.mixer.path
        return None if part is None else {"attention": family.attention, "mixer": mixer, "mlp": family.mlp}[part]

    def adds_up(self, block: nn.Module) -> bool:
        return self.family.has_norms_first(block)

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        for path in self.final:
            parent, _, name = path.rpartition(".")
            if (module := getattr(model.get_submodule(parent), name)) is not None:
                hidden = module(hidden)
        return hidden

    def maps(self, block: nn.Module, site: Site) -> list[nn.Linear]:
        if not site.form.coupled:
            return super().maps(block, site)
        part = _part(site)
        return [linear_at(block, path) for path in (*self.family.producers(part), self.family.columns[part])]

    @property
    def patches(self) -> bool:
        return self.family.patches

    def patch(self, block: nn.Module, site: Site) -> LowRank | None:
        return self._patch(block) if self.part(site) == "mlp" else None

    def add_patch(self, block: nn.Module, site: Site, left: Tensor, right: Tensor) -> None:
        if not self.patches or self.part(site) != "mlp" or self.family.mlp is None:
            super().add_patch(block, site, left, right)
            return
        mlp, beside = block.get_submodule(self.family.mlp), low_rank(left, right, like=self.linear(block, site).weight)
        block.set_submodule(self.family.mlp, patched(mlp, beside.train(mlp.training)))

    def pruned(self, block: nn.Module, site: Site, candidate: Candidate) -> dict[str, nn.Module]:
        if candidate.factors is not None and isinstance(site.form, Values):
            made, reading = self.values_path(site), self.path(site)
            narrow = narrowed_heads(linear_at(block, made), linear_at(block, reading), *candidate.factors)
            return dict(zip((made, reading), narrow, strict=True))
        if candidate.factors is not None:
            return {self.path(site): factored(self.linear(block, site), *candidate.factors)}
        if not site.form.coupled:
            return super().pruned(block, site, candidate)
        if candidate.kept is None:
            raise ValueError(f"{site.name}: only candidates with groups can be cut out")
        if not candidate.kept:
            return self._stubs(block, site)
        kept = torch.tensor(candidate.kept)
        *producers, own = self.cuts(block, site)
        changed = {cut.path: _sliced(block, cut, kept) for cut in producers if cut.parameter == "weight"}
        changed[own.path] = _sliced(block, own, kept, source=candidate.weight)
        for cut, weight in zip(producers, candidate.producers, strict=bool(candidate.producers)):
            module = changed[cut.path]
            module.weight = nn.Parameter(weight.to(module.weight), module.weight.requires_grad)
        if (holder := self.holder(site)) is None:
            return dict(changed)
        inside = {path.removeprefix(f"{holder}."): module for path, module in changed.items()}
        whole = grafted(block.get_submodule(holder), inside)
        if site.kind == "attention":
            query, kv, _ = self.heads(block)
            left = query * len(candidate.kept) // site.n_groups
            whole._parameters = dict(whole._parameters)  # `block` keeps its own
            for cut in (cut for cut in producers if cut.parameter != "weight"):
                value = whole.get_parameter(cut.parameter)
                picked = value.detach()[_stays(cut, len(value), kept).to(value.device)]
                whole._parameters[cut.parameter] = nn.Parameter(picked, value.requires_grad)
            self.family.recount(whole, left, kv if _by_query(site, kv) else left * kv // query)
        elif site.kind == "mixer":
            self._cut_mixer(block, site, whole, kept)
        return {holder: whole}

    # -- how a block is made ---------------------------------------------------------------------------

    def cuts(self, block: nn.Module, site: Site) -> Sequence[Cut]:
        if isinstance(site.form, Values):
            path = self.values_path(site)
            rows = torch.arange(linear_at(block, path).out_features)[None]
            return Cut(path, 0, rows), Cut(self.path(site), 1, torch.arange(site.d_in)[None])
        if not site.form.coupled:
            return super().cuts(block, site)
        own = torch.tensor(site.columns(range(site.n_groups))).reshape(site.n_groups, -1)
        index: dict[Unit, Tensor]  # (n_groups, rows of a group)
        if site.kind == "mixer":
            mixer, sections = self.mixer_of(block)
            fronts = [Cut(f"{mixer.path}.{name}", 0, _runs(sections[name], site.n_groups)) for name in mixer.front]
            return *fronts, Cut(self.family.columns["mixer"], 1, own)
        if site.kind == "mlp":
            total: dict[Unit, int] = {"width": site.d_in}
            index = {"width": own}
        else:
            query, kv, width = self.heads(block)
            sizes: dict[Unit, int] = {"query": query, "gated": 2 * query, "kv": kv, "qkv": query + 2 * kv}
            total = {unit: heads * width for unit, heads in sizes.items()}
            every = torch.arange(total["qkv"]).reshape(kv, -1)  # in every KV group its queries, its keys, its values
            if _by_query(site, kv):  # keys and values stay: each still has readers
                queries = every[:, : query // kv * width].reshape(kv, site.n_groups, -1)
                index = {"query": own, "qkv": queries.transpose(0, 1).reshape(site.n_groups, -1)}
            else:
                keys = torch.arange(total["kv"])
                index = {"query": own, "kv": keys.reshape(site.n_groups, -1), "qkv": every.reshape(site.n_groups, -1)}
            index["gated"] = torch.cat([own + own // width * width, own + (own // width + 1) * width], dim=1)
        producers = [_cut(path, self.family.units(path), index, total) for path in self.family.producers(_part(site))]
        if site.kind == "attention":
            heads = own[:, :: self.head_dim(block)] // self.head_dim(block)
            producers += [Cut(self.family.attention, 0, heads, name) for name in self.family.per_head]
        return *(cut for cut in producers if cut.index.numel()), Cut(self.family.columns[_part(site)], 1, own)

    def mixer_of(self, block: nn.Module) -> tuple[TokenMixer, Mapping[str, tuple[int, ...]]]:
        """What the family calls the mixer of a block, and the sections of its parameters."""
        mixer = self.family.mixer
        assert mixer is not None
        return mixer, mixer.sections(block.get_submodule(mixer.path))

    def left(self, block: nn.Module) -> tuple[Part, ...]:
        """The parts that a block has, without those that were dropped, in order of execution."""
        dropped = self.dropped(block)
        return tuple(part for part in PARTS if self.family.there(block, part) and part not in dropped)

    def heads(self, block: nn.Module) -> tuple[int, int, int]:
        """(query heads, KV heads, head width) of the block's attention, read from its modules."""
        width = self.head_dim(block)
        query = kv = map_at(block, self.family.columns["attention"]).in_features // width
        for path in self.family.producers("attention"):
            units = self.family.units(path)
            if times := units.count("kv") + 2 * units.count("qkv"):
                of_queries = query * (units.count("query") + units.count("qkv"))
                kv = (map_at(block, path).out_features // width - of_queries) // times
        return query, kv, width

    def head_dim(self, block: nn.Module) -> int:
        """Width of a head, which pruning never changes."""
        attention = block.get_submodule(self.family.attention)
        return int(getattr(attention, "head_dim" if isinstance(attention, SkippedMixer) else self.family.head_dim))

    def heads_apart(self, block: nn.Module) -> bool:
        """Whether heads can go one by one; where what one computes depends on others, attention is one group."""
        return True

    def dropped(self, block: nn.Module) -> tuple[Part, ...]:
        """The parts of a block that were dropped."""
        paths: dict[Part, str] = {
            "attention": self.family.attention,
            "mlp": self.family.mlp or self.family.columns["mlp"],
        }
        paths |= {} if self.family.mixer is None else {"mixer": self.family.mixer.path}
        stubs = SkippedMixer, SkippedState, SkippedMLP
        there: list[Part] = [part for part in PARTS if self.family.there(block, part)]
        return tuple(part for part in there if isinstance(block.get_submodule(paths[part]), stubs))

    def biased(self, block: nn.Module) -> tuple[Part, ...]:
        """The parts of a block whose linear map with cut columns has a bias."""
        return tuple(part for part in self.left(block) if map_at(block, self.family.columns[part]).bias is not None)

    def ranks(self, block: nn.Module) -> dict[str, int]:
        """The ranks of the linear maps of a block that are two, by path."""
        paths = [
            path for part in self.left(block) for path in (*self.family.producers(part), self.family.columns[part])
        ]
        maps = {path: map_at(block, path) for path in paths}
        return {path: found.rank for path, found in maps.items() if isinstance(found, LowRank)}

    def value_width(self, block: nn.Module) -> int:
        """Values of every head of a block where they are fewer than its width; 0: as many, or there is no attention."""
        reading = map_at(block, self.family.columns["attention"]) if "attention" in self.left(block) else None
        return reading.kept if isinstance(reading, NarrowHeads) else 0

    def patch_rank(self, block: nn.Module) -> int:
        """The rank of the linear map beside the MLP of a block; 0: there is none."""
        beside = self._patch(block)
        return 0 if beside is None else beside.rank

    def layer_config(self, block: nn.Module) -> dict[str, Any]:
        """Sizes of a (pruned) block as an entry of `per_layer_config`; `skip` lists dropped parts."""
        family, dropped = self.family, self.dropped(block)
        entry: dict[str, Any] = {"skip": list(dropped)} if dropped else {}
        entry |= self._mixing(block)
        if "mlp" not in dropped:
            entry[family.width] = map_at(block, family.columns["mlp"]).in_features
        return entry

    def _mixing(self, block: nn.Module) -> dict[str, Any]:
        """What an entry of `per_layer_config` says of attention, or of what stands in its place."""
        family = self.family
        if not family.there(block, "attention"):
            if "mixer" in self.dropped(block) or family.mixer is None:
                return {}
            module = block.get_submodule(family.mixer.path)
            return family.mixer.sizes(module)
        query, kv = (1, 1) if "attention" in self.dropped(block) else self.heads(block)[:2]  # a stub caches one head
        return {family.query_heads: query} | ({} if family.kv_heads is None else {family.kv_heads: kv})

    # -- inside ------------------------------------------------------------------------------------------

    def _patch(self, block: nn.Module) -> LowRank | None:
        mlp = None if self.family.mlp is None else block.get_submodule(self.family.mlp)
        return mlp.patch if isinstance(mlp, Patched) else None

    def sites_in(self, block: nn.Module, index: int, part: Part, heads: Heads) -> tuple[Site, ...]:
        """The sites of a part of a block: it is one, or, of attention whose heads stay, three are inside."""
        if part == "attention" and heads == "narrow":
            return self._narrow_sites(block, index)
        return (self._site(block, index, part, heads),)

    def _narrow_sites(self, block: nn.Module, index: int) -> tuple[Site, ...]:
        family, reading = self.family, self.family.columns["attention"]
        paths = family.separate
        if paths is None:
            raise UnsupportedModel(
                f"models of type {family.model_type!r} have no linear maps of queries, keys and values by themselves; "
                "choose heads: kv"
            )
        name = f"{self.layers}.{index}.{reading}"
        for path in (*paths, reading):
            check_plain(block, path, name)
        query, kv, width = self.heads(block)
        if query % kv:
            raise UnsupportedModel(f"{name}: {query} query heads do not share {kv} KV heads evenly")
        *front, made = paths
        ranks = tuple(self._linear_site(block, index, path, tuple(front), RANKS) for path in front)
        values, own = linear_at(block, made), linear_at(block, reading)
        each = query * own.out_features + kv * (values.in_features + (values.bias is not None))
        site = Site(
            name, index, "attention", width, 1, each,
            d_out=own.out_features, form=Values(query, kv), inputs=own.in_features,
        )  # fmt: skip
        return *ranks, site

    def values_path(self, site: Site) -> str:
        """The linear map that makes the values of a site whose values get narrower."""
        paths = self.family.separate
        assert paths is not None, site.name
        return paths[-1]

    def _site(self, block: nn.Module, index: int, part: Part, heads: Heads) -> Site:
        path = self.family.columns[part]
        name = f"{self.layers}.{index}.{path}"
        for each in (path, *self.family.producers(part)):
            check_plain(block, each, name)
        linear = linear_at(block, path)
        columns = linear.in_features
        n_groups, spread, cached = columns, 1, 0
        if part == "attention":
            query, kv, width = self.heads(block)
            if query % kv:
                raise UnsupportedModel(f"{name}: {query} query heads do not share {kv} KV heads evenly")
            by_query = heads == "query" and query > kv
            n_groups, spread, cached = (query // kv, kv, 0) if by_query else (kv, 1, 2 * width)
            if not self.heads_apart(block):
                n_groups, spread, cached = 1, 1, 2 * kv * width
        elif part == "mixer":
            mixer, _ = self.mixer_of(block)
            n_groups = mixer.units(block.get_submodule(mixer.path))
        site = Site(
            name, index, part, n_groups, columns // n_groups, 0,
            cached_per_group=cached, spread=spread, d_out=linear.out_features,
        )  # fmt: skip
        each = sum(_per_group(block, cut) for cut in self.cuts(block, site)) + self._beside(block, site)
        gone = (block.get_submodule(path) for path in self._stubs(block, site))
        total = sum(p.numel() for module in gone for p in module.parameters())
        return replace(site, params_per_group=each, params_fixed=total - n_groups * each)

    def _stubs(self, block: nn.Module, site: Site) -> dict[str, nn.Module]:
        head_dim = self.head_dim(block) if site.kind == "attention" else 0
        return self.family.skipped(block, _part(site), site.block, head_dim)

    def _beside(self, block: nn.Module, site: Site) -> int:
        """Parameters of a group that are of no linear map: of a mixer its convolution and what else there is."""
        if site.kind != "mixer":
            return 0
        mixer, sections = self.mixer_of(block)
        module, total = block.get_submodule(mixer.path), 0
        for name in sections.keys() - {*mixer.front}:
            found = getattr(module, name)
            total += sum(p.numel() for p in (found.parameters() if isinstance(found, nn.Module) else [found]))
        return total // site.n_groups

    def _cut_mixer(self, block: nn.Module, site: Site, whole: Any, kept: Tensor) -> None:
        """Leave in a mixer what goes with the units that stay, in place; its linear maps are cut, `block` stays."""
        mixer, sections = self.mixer_of(block)
        whole._parameters = dict(whole._parameters)  # `block` keeps its own
        for name in sections.keys() - {*mixer.front}:
            stays = _runs(sections[name], site.n_groups)[kept].flatten().sort().values
            found = getattr(whole, name)
            if isinstance(found, nn.Conv1d):
                small = depthwise(found, len(stays), torch.device("meta")).train(found.training)
                small.weight = _slice(found.weight, stays)
                small.bias = None if found.bias is None else _slice(found.bias, stays)
                whole._modules[name] = small
            else:
                whole._parameters[name] = _slice(found, stays)
        mixer.recount(whole, len(kept))


def map_at(block: nn.Module, path: str) -> nn.Linear | LowRank | NarrowValues | NarrowHeads:
    """A linear map of a block, in one piece or two, or of narrower values."""
    found = block.get_submodule(path)
    assert isinstance(found, nn.Linear | LowRank | NarrowValues | NarrowHeads)
    return found


def _part(site: Site) -> Part:
    """The sub-layer of a site of groups."""
    return next(part for part in PARTS if part == site.kind)


def _by_query(site: Site, kv_heads: int) -> bool:
    """Whether the groups of an attention site are query heads inside KV groups."""
    return site.spread > 1 or (kv_heads == 1 and site.n_groups > 1)


def _cut(path: str, units: Sequence[Unit], index: Mapping[Unit, Tensor], total: Mapping[Unit, int]) -> Cut:
    """The rows of a linear map in front that go with each group, where rows of one unit are below those of another."""
    above, rows = 0, list[Tensor]()
    for unit in units:
        if unit in index:
            rows.append(index[unit] + above)
        above += total[unit]
    return Cut(path, 0, torch.cat(rows, dim=1) if rows else torch.empty(0, 0))


def _sliced(block: nn.Module, cut: Cut, kept: Tensor, source: Tensor | None = None) -> nn.Linear:
    """The linear map without what goes with groups that are not kept."""
    linear = linear_at(block, cut.path)
    stays = _stays(cut, linear.weight.shape[cut.dim], kept)
    return sliced(linear, 0 if cut.dim == 0 else 1, stays, source)


def _runs(section: Sequence[int], groups: int) -> Tensor:
    """Which slices go with each group where there are runs of as many for each in every section, (groups, width)."""
    above, found = 0, list[Tensor]()
    for width in section:
        found.append(above + torch.arange(groups * width).reshape(groups, width))
        above += groups * width
    return torch.cat(found, dim=1)


def _slice(value: Tensor, index: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().index_select(0, index.to(value.device)), value.requires_grad)


def _stays(cut: Cut, length: int, kept: Tensor) -> Tensor:
    """Which of so many slices are left without groups that are not kept."""
    stays = torch.ones(length, dtype=torch.bool)
    stays[cut.index.flatten()] = False
    stays[cut.index[kept].flatten()] = True
    # ascending, because query head h reads KV head h // n_rep also where a group is spread over all of them
    return stays.nonzero().flatten()


def _per_group(block: nn.Module, cut: Cut) -> int:
    if cut.parameter != "weight":  # one value for every head
        return cut.index.shape[1]
    linear = linear_at(block, cut.path)
    width, other = cut.index.shape[1], linear.weight.shape[1 - cut.dim]
    return width * other + (width if cut.dim == 0 and linear.bias is not None else 0)
