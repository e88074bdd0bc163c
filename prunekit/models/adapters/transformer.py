"""Where a model can be cut, what goes with each cut, and how it is made.

A family of transformers is data: `modeling.Family` names its parts. Sites, prices, slices and dropped
sub-layers follow from the names and from the shapes of the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from prunekit.layer.candidates import Candidate
from prunekit.models.classes import Family, Part, SkippedMixer, SkippedMLP, recount
from prunekit.models.modules import grafted, sliced
from prunekit.plugins.adapter import Cut, Heads, ModelAdapter, UnsupportedModel, check_plain, linear_at
from prunekit.space.sites import Site

PARTS: tuple[Part, ...] = get_args(Part)  # in order of execution


@dataclass(frozen=True)
class Transformer(ModelAdapter):
    """A family whose blocks are attention and an MLP: heads and neurons are groups, sub-layers can be dropped.

    A family sets the class variables; it overrides `cuts` when its rows are laid out in a way `Family.rows` cannot say.
    """

    family: ClassVar[Family]
    layers = "model.layers"
    final: ClassVar[tuple[str, ...]] = (
        "model.norm",
        "lm_head",
    )  # modules after the last block, in order; absent ones are passed over

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
                stages += [self._producers(part), (self.family.columns[part],)]
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

    def maps(self, block: nn.Module, site: Site) -> list[nn.Linear]:
        if not site.form.shrinks:
            return super().maps(block, site)
        part = _part(site)
        return [linear_at(block, path) for path in (*self._producers(part), self.family.columns[part])]

    def pruned(self, block: nn.Module, site: Site, candidate: Candidate) -> dict[str, nn.Module]:
        if not site.form.shrinks:
            return super().pruned(block, site, candidate)
        if candidate.kept is None:
            raise ValueError(f"{site.name}: only candidates with groups can be cut out")
        if not candidate.kept:
            return self._stubs(block, site)
        kept = torch.tensor(candidate.kept)
        *producers, own = self.cuts(block, site)
        # ascending, because query head h reads KV head h // n_rep also where a group is spread over all of them
        changed = {cut.path: sliced(linear_at(block, cut.path), cut.dim, _rows(cut, kept)) for cut in producers}
        columns = _rows(own, kept)
        changed[own.path] = sliced(linear_at(block, own.path), 1, columns, source=candidate.weight)
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
        if not site.form.shrinks:
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
        producers = [Cut(path, 0, index[unit]) for path, unit in self.family.rows.items() if unit in index]
        return *producers, Cut(self.family.columns[_part(site)], 1, own)

    def heads(self, block: nn.Module) -> tuple[int, int, int]:
        """(query heads, KV heads, head width) of the block's attention, read from its modules."""
        width = self.head_dim(block)
        query = linear_at(block, self.family.columns["attention"]).in_features // width
        keys = next((path for path, unit in self.family.rows.items() if unit == "kv"), None)
        return query, query if keys is None else linear_at(block, keys).out_features // width, width

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
        return tuple(part for part in there if linear_at(block, self.family.columns[part]).bias is not None)

    def layer_config(self, block: nn.Module) -> dict[str, Any]:
        """Sizes of a (pruned) block as an entry of `per_layer_config`; `skip` lists dropped parts."""
        family, dropped = self.family, self.dropped(block)
        entry: dict[str, Any] = {"skip": list(dropped)} if dropped else {}
        query, kv = (1, 1) if "attention" in dropped else self.heads(block)[:2]  # a stub caches one head
        entry[family.query_heads] = query
        if family.kv_heads is not None:
            entry[family.kv_heads] = kv
        if "mlp" not in dropped:
            entry[family.width] = linear_at(block, family.columns["mlp"]).in_features
        return entry

    # -- inside ------------------------------------------------------------------------------------------

    def _site(self, block: nn.Module, index: int, part: Part, heads: Heads) -> Site:
        path = self.family.columns[part]
        name = f"{self.layers}.{index}.{path}"
        for each in (path, *self.family.rows):
            if each.startswith(f"{self.family.attention}.") == (part == "attention"):
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
        site = Site(
            name, index, part, n_groups, columns // n_groups, 0,
            cached_per_group=cached, spread=spread, d_out=linear.out_features,
        )  # fmt: skip
        each = sum(_per_group(block, cut) for cut in self.cuts(block, site))
        gone = (block.get_submodule(path) for path in self._stubs(block, site))
        total = sum(p.numel() for module in gone for p in module.parameters())
        return replace(site, params_per_group=each, params_fixed=total - n_groups * each)

    def _producers(self, part: Part) -> tuple[str, ...]:
        """The linear maps in front of the one whose columns are cut."""
        inside = f"{self.family.attention}."
        return tuple(path for path in self.family.rows if path.startswith(inside) == (part == "attention"))

    def _stubs(self, block: nn.Module, site: Site) -> dict[str, nn.Module]:
        return self.family.skipped(block, _part(site), site.block, self.head_dim(block))


def _part(site: Site) -> Part:
    """The sub-layer of a site of groups."""
    return next(part for part in PARTS if part == site.kind)


def _by_query(site: Site, kv_heads: int) -> bool:
    """Whether the groups of an attention site are query heads inside KV groups."""
    return site.spread > 1 or (kv_heads == 1 and site.n_groups > 1)


def _rows(cut: Cut, kept: Tensor) -> Tensor:
    return cut.index[kept].flatten().sort().values


def _per_group(block: nn.Module, cut: Cut) -> int:
    linear = linear_at(block, cut.path)
    width, other = cut.index.shape[1], linear.weight.shape[1 - cut.dim]
    return width * other + (width if cut.dim == 0 and linear.bias is not None else 0)
