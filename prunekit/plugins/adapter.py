"""Adapters: where a model can be cut, what goes with each cut, and how it is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prunekit.errors import WrongInput
from prunekit.layer.candidates import Candidate
from prunekit.space.forms import Form
from prunekit.space.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Heads = Literal["kv", "query", "narrow"]
"""What goes of attention: KV heads with their query heads, query heads of every KV head, or, of heads that all stay,
ranks of queries and keys and the width of values."""
Inside = Literal["whole", "neurons"]
"""What goes of a mixture of experts: whole experts, or neurons of every one."""


class UnsupportedModel(WrongInput):
    """A model no adapter knows, or one whose shape its adapter cannot cut."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Slices of one parameter along one dimension, by group: rows (0, a bias with them) or columns (1) of a linear map,
    or whatever else a parameter is made of, such as the experts of a layer."""

    path: str  # of the module inside its block
    dim: int
    index: Tensor  # (n_groups, width): which slices go with each group
    parameter: str = "weight"  # of the module

    @property
    def name(self) -> str:
        """Of the parameter inside its block; of the weight of a module, that of the module."""
        return self.path if self.parameter == "weight" else f"{self.path}.{self.parameter}"

    def rows(self, block: nn.Module) -> tuple[int, int]:
        """(rows, columns) of the parameter as a matrix whose slices are equal blocks of rows."""
        value = block.get_submodule(self.path).get_parameter(self.parameter)
        columns = _columns(value.movedim(self.dim, 0))
        return value.numel() // columns, columns

    def taken(self, block: nn.Module, groups: Tensor | None = None) -> Tensor:
        """The slices of some groups, or of all, one below the other: (rows, columns), in the order of the groups."""
        value = block.get_submodule(self.path).get_parameter(self.parameter).detach().movedim(self.dim, 0)
        index = (self.index if groups is None else self.index[groups]).flatten().to(value.device)
        whole = torch.equal(
            index, torch.arange(len(value), device=index.device)
        )  # wide ones are not copied for nothing
        return (value if whole else value[index]).reshape(-1, _columns(value))


@dataclass(frozen=True)
class ModelAdapter(ABC):
    """What the road asks of a model: its blocks, and their linear maps in order of execution.

    `block` below is one of `model`. Single weights can be removed in every family; groups, and with them whole
    sub-layers, where the family says how; maps become two of low rank where there are classes for such models.
    """

    layers: ClassVar[str]  # path of the list of blocks
    factors: ClassVar[bool] = False  # are there classes whose linear maps may be two of low rank?
    images: ClassVar[bool] = False  # is the language model a part of a model that takes images, too?

    def opened(self, model: PreTrainedModel) -> PreTrainedModel:
        """What is pruned in the place of a model that was read: itself, or a model of another class that computes the
        same.

        Raises:
            UnsupportedModel: no class that can be pruned computes the same.
        """
        return model

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks, in order of execution."""
        found = model.get_submodule(self.layers)
        assert isinstance(found, nn.ModuleList)
        return found

    def sites(self, model: nn.Module, heads: Heads = "kv") -> tuple[Site, ...]:
        """All sites where groups are removed, in order of execution. Heads go by whole KV groups, or evenly from every
        KV group; where every KV head has one query head, the two are the same. Or all stay, and there are sites inside
        of them: the maps of queries and keys, of low rank, and narrower values.

        Raises:
            UnsupportedModel: the family has no groups, or no maps of queries, keys and values by themselves, or a
                linear map is not a plain one, say because the model is quantized.
        """
        name = getattr(model.config, "model_type", type(model).__name__)
        raise UnsupportedModel(
            f"models of type {name!r} have no groups that can be cut out; "
            "remove single weights with structure weights or a pattern N:M, such as 2:4"
        )

    def sites_of(
        self, model: nn.Module, form: Form, heads: Heads = "kv", experts: Inside = "whole"
    ) -> tuple[Site, ...]:
        """All sites where something of a form is removed, in order of execution. `experts` is of those that have any.

        Raises:
            UnsupportedModel: as `sites` and `linear_sites`.
        """
        return self.sites(model, heads=heads) if form.coupled else self.linear_sites(model, form)

    def linear_sites(self, model: nn.Module, form: Form) -> tuple[Site, ...]:
        """Every linear map of every block as a site where single weights are removed, or ranks, in order of execution.

        Raises:
            UnsupportedModel: a linear map is not a plain one, its rows are no whole number of pattern blocks, or the
                family has no classes of low rank.
        """
        if form.shrinks and not self.factors:
            name = getattr(model.config, "model_type", type(model).__name__)
            raise UnsupportedModel(
                f"models of type {name!r} have no class whose linear maps may be two of low rank; "
                "remove single weights with structure weights or a pattern N:M, such as 2:4"
            )
        return tuple(
            self._linear_site(block, index, path, shared, form)
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
        """Whether a block is its input plus its sub-layers' outputs; not where norms come behind either."""

    @abstractmethod
    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """What the model makes of the last block's output: (..., d) -> (..., vocabulary)."""

    def answer(self, hidden: Tensor) -> Any:
        """What a block of the model answers where its output is `hidden`."""
        return hidden

    def exposed(self, block: nn.Module) -> AbstractContextManager[None]:
        """Within, a run of `block` calls every linear map, so that hooks see what each receives."""
        return nullcontext()

    def path(self, site: Site) -> str:
        """Path in a block of the linear map that `site` cuts."""
        return site.name.removeprefix(f"{self.layers}.{site.block}.")

    def linear(self, block: nn.Module, site: Site) -> nn.Linear:
        """The linear map whose input columns `site` cuts."""
        return self.map_at(block, self.path(site))

    def map_at(self, block: nn.Module, path: str) -> nn.Linear:
        """The linear map at a path in a block: a module of it, or one that stands for what a module adds up.

        It is the same object as long as the block is, so that what it receives can be listened to, and its weight can
        be another for a while. Only of a module of the block can the weight be changed for good.
        """
        return linear_at(block, path)

    def stream_before(self, site: Site) -> str | None:
        """Path in a block of the module that receives the sum that the site's output is added to; None: that sum is
        what enters the block and the outputs of the sites before."""
        return None

    def multiplied(self, block: nn.Module) -> int:
        """How many weights of a block a token is multiplied with."""
        return sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model that a run has for itself, made in place to compute in a way in which it can be looked at."""
        return model

    @property
    def patches(self) -> bool:
        """Whether there are classes whose MLPs may have a linear map of low rank beside them."""
        return False

    def patch(self, block: nn.Module, site: Site) -> nn.Module | None:
        """The linear map beside the sub-layer of a site, from its input to its output; None, as here: there is none."""
        return None

    def add_patch(self, block: nn.Module, site: Site, left: Tensor, right: Tensor) -> None:
        """Put the map left (d_out, r) · right (r, d) beside the sub-layer of a site, in place.

        Raises:
            UnsupportedModel: there is no class for such a model.
        """
        raise UnsupportedModel(f"{site.name} is of a family whose MLPs cannot have a linear map beside them")

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

    def _linear_site(self, block: nn.Module, index: int, path: str, shared: tuple[str, ...], form: Form) -> Site:
        prefix = f"{self.layers}.{index}"
        name = f"{prefix}.{path}"
        check_plain(block, path, name)
        linear = linear_at(block, path)
        d_in, d_out = linear.in_features, linear.out_features
        if form.m and d_in % form.m:
            raise UnsupportedModel(
                f"{name} has rows of {d_in} weights, which are no whole blocks of {form.m}; "
                "choose a pattern N:M whose M divides them, or structure weights"
            )
        return Site(
            name, index, "linear", form.most(d_in, d_in, d_out), 1, form.each(d_in, d_out),
            d_out=d_out, form=form, input_group=f"{prefix}.{shared[0]}" if len(shared) > 1 else "",
            inputs=d_in if form.shrinks else 0,
        )  # fmt: skip


def reweighted(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """A linear map of the same shape with another weight; it shares the bias."""
    other = type(linear)(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight = nn.Parameter(weight.detach().to(linear.weight), linear.weight.requires_grad)
    other.bias = linear.bias
    return other.train(linear.training)


def _columns(value: Tensor) -> int:
    """Of a parameter as a matrix of rows; of a vector, one."""
    return value.shape[-1] if value.ndim > 1 else 1


def linear_at(block: nn.Module, path: str) -> nn.Linear:
    found = block.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


def check_plain(block: nn.Module, path: str, name: str) -> None:
    found = block.get_submodule(path)
    if not isinstance(found, nn.Linear) or not found.weight.is_floating_point():
        raise UnsupportedModel(
            f"{name} needs plain linear maps, but {path} is {type(found).__name__}; "
            "prune before quantizing, factoring or wrapping"
        )
