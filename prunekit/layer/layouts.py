"""Layouts: what the forms of `prunekit.space.forms` mean for tensors.

Checking a candidate, its place in a file, and what becomes of a weight: whoever handles candidates asks the layout of
the site and no longer what is removed there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from prunekit.layer.candidates import Candidate, is_sparse, narrow_product, product
from prunekit.space.forms import Units, Values
from prunekit.space.sites import Site

Stored = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Dtype and shape of every tensor of a file, by name."""


Columns = Callable[[Sequence[int]], Tensor]
"""Columns of some groups, as of `LayerProblem.columns`."""


class Layout(ABC):
    """The tensor side of a form."""

    @abstractmethod
    def fault(self, site: Site, kept: int, candidate: Candidate, columns: Columns) -> str:
        """What is wrong with a pruner's answer for a count, in words; empty where it is right.

        Args:
            site: where it was asked.
            kept: the count that was asked for.
            candidate: its weight is (d_out, d_in), finite, columns group by group.
            columns: of groups, in the order of the candidate's.
        """

    def rounded(self, candidate: Candidate, dtype: torch.dtype) -> Candidate:
        """In the dtype of the checkpoint: what is judged is what will be saved."""
        producers = tuple(each.to(dtype) for each in candidate.producers)
        return Candidate(candidate.kept, candidate.weight.to(dtype), producers=producers)

    def overflow(self, site: Site, kept: int, weight: Float[Tensor, "d_out kept"]) -> str:
        """How a weight of the small model exceeds its count, in words; here it cannot, for its shape says it."""
        return ""

    @abstractmethod
    def encode(self, site: Site, kept: int, candidate: Candidate) -> dict[str, Tensor]:
        """The tensors of a candidate in a file."""

    @abstractmethod
    def decode(self, site: Site, kept: int, read: Callable[[str], Tensor]) -> Candidate:
        """The candidate from the tensors of a file, with a full-width weight (d_out, d_in)."""

    @abstractmethod
    def stored(self, site: Site, kept: int, dtype: torch.dtype) -> Stored:
        """The tensors that `encode` makes of a weight in a dtype, without one: what a plan counts."""

    @abstractmethod
    def width(self, site: Site, kept: int) -> int:
        """Columns of a candidate that may hold something else than zeros."""

    @abstractmethod
    def freed(self, site: Site, kept: int) -> int:
        """Parameters that are gone from the model; zeros are none."""

    @abstractmethod
    def groups(self, site: Site, candidate: Candidate) -> Sequence[int]:
        """The groups of a site that a small model has."""

    def stand_in(self, site: Site, kept: int, weight: Tensor) -> Candidate:
        """A candidate of the right shape, whatever its values."""
        return Candidate(tuple(range(kept)), weight)

    def drops(self, weight: Float[Tensor, "d_out d_in"]) -> bool:
        """Whether a full-width weight means that the whole sub-layer, biases included, is dropped."""
        return False


class GroupLayout(Layout):
    """Whole groups: ids, and the columns that stay."""

    def fault(self, site: Site, kept: int, candidate: Candidate, columns: Columns) -> str:
        ids = candidate.kept
        if ids is None or len(ids) != kept or list(ids) != sorted(set(ids)):
            return f"{kept} groups in ascending order were asked, not {ids}"
        if ids and not 0 <= ids[0] <= ids[-1] < site.n_groups:
            return f"ids below {site.n_groups} were asked, not {ids}"
        stays = set(ids)
        gone = columns([g for g in range(site.n_groups) if g not in stays])
        return f"columns outside the {kept} kept groups are not zero" if bool(candidate.weight[:, gone].any()) else ""

    def encode(self, site: Site, kept: int, candidate: Candidate) -> dict[str, Tensor]:
        assert candidate.kept is not None
        columns = torch.tensor(site.columns(candidate.kept), dtype=torch.long)
        return {
            "kept": torch.tensor(candidate.kept, dtype=torch.int32),
            "weight": candidate.weight[:, columns].contiguous(),
        }

    def decode(self, site: Site, kept: int, read: Callable[[str], Tensor]) -> Candidate:
        groups, columns = tuple(read("kept").tolist()), read("weight")
        weight = columns.new_zeros(columns.shape[0], site.d_in)
        weight[:, torch.tensor(site.columns(groups), dtype=torch.long)] = columns
        return Candidate(groups, weight)

    def stored(self, site: Site, kept: int, dtype: torch.dtype) -> Stored:
        return {"kept": (torch.int32, [kept]), "weight": (dtype, [site.d_out, kept * site.group_size])}

    def width(self, site: Site, kept: int) -> int:
        return kept * site.group_size

    def freed(self, site: Site, kept: int) -> int:
        return site.parameters(site.n_groups) - site.parameters(kept)

    def groups(self, site: Site, candidate: Candidate) -> Sequence[int]:
        return candidate.kept or ()

    def drops(self, weight: Float[Tensor, "d_out d_in"]) -> bool:
        return not weight.any()


class NeuronLayout(GroupLayout):
    """Neurons inside experts: ids of columns of the map of all experts side by side, as many of every expert."""

    def fault(self, site: Site, kept: int, candidate: Candidate, columns: Columns) -> str:
        ids, width = candidate.kept, site.d_in // site.experts
        if ids is None or list(ids) != sorted(set(ids)) or (ids and not 0 <= ids[0] <= ids[-1] < site.d_in):
            return f"neurons below {site.d_in} in ascending order were asked, not {ids}"
        counts = [0] * site.experts
        for each in ids:
            counts[each // width] += 1
        if {*counts} != {kept * site.tile}:
            return f"{kept * site.tile} neurons of every expert were asked, not {counts}"
        gone = torch.ones(site.d_in, dtype=torch.bool)
        gone[list(ids)] = False
        return "columns of neurons that are not kept are not zero" if bool(candidate.weight[:, gone].any()) else ""

    def encode(self, site: Site, kept: int, candidate: Candidate) -> dict[str, Tensor]:
        assert candidate.kept is not None
        ids = torch.tensor(candidate.kept, dtype=torch.long)
        return {"kept": ids.int(), "weight": candidate.weight[:, ids].contiguous()}

    def decode(self, site: Site, kept: int, read: Callable[[str], Tensor]) -> Candidate:
        ids, columns = read("kept").long(), read("weight")
        weight = columns.new_zeros(columns.shape[0], site.d_in)
        weight[:, ids] = columns
        return Candidate(tuple(ids.tolist()), weight)

    def stored(self, site: Site, kept: int, dtype: torch.dtype) -> Stored:
        ids = kept * site.group_size
        return {"kept": (torch.int32, [ids]), "weight": (dtype, [site.d_out, ids])}

    def groups(self, site: Site, candidate: Candidate) -> Sequence[int]:
        return range(len(candidate.kept or ()) // site.group_size)

    def stand_in(self, site: Site, kept: int, weight: Tensor) -> Candidate:
        width = site.d_in // site.experts
        return Candidate(tuple(e * width + j for e in range(site.experts) for j in range(kept * site.tile)), weight)


class SparseLayout(Layout):
    """Single weights: a bit mask, and the values under it."""

    def fault(self, site: Site, kept: int, candidate: Candidate, columns: Columns) -> str:
        if candidate.kept is not None:
            return "a weight without groups was asked, and some were named"
        if not is_sparse(candidate.weight, kept, site.form.m):
            return f"{site.describe(kept)} weights per row were asked, and more are other than zero"
        return ""

    def overflow(self, site: Site, kept: int, weight: Float[Tensor, "d_out kept"]) -> str:
        return "" if is_sparse(weight, kept, site.form.m) else f"more than {site.describe(kept)} weights per row"

    def encode(self, site: Site, kept: int, candidate: Candidate) -> dict[str, Tensor]:
        mask = candidate.weight != 0
        return {"mask": _packed(mask), "values": candidate.weight[mask]}

    def decode(self, site: Site, kept: int, read: Callable[[str], Tensor]) -> Candidate:
        values, mask = read("values"), _unpacked(read("mask"), site.d_out * site.d_in).view(site.d_out, site.d_in)
        weight = values.new_zeros(site.d_out, site.d_in)
        weight[mask] = values
        return Candidate(None, weight)

    def stored(self, site: Site, kept: int, dtype: torch.dtype) -> Stored:
        """Where no weight that was kept is zero by chance."""
        return {"mask": (torch.uint8, [-(-site.d_out * site.d_in // 8)]), "values": (dtype, [kept * site.d_out])}

    def width(self, site: Site, kept: int) -> int:
        return site.d_in

    def freed(self, site: Site, kept: int) -> int:
        return 0

    def groups(self, site: Site, candidate: Candidate) -> Sequence[int]:
        return range(site.n_groups)

    def stand_in(self, site: Site, kept: int, weight: Tensor) -> Candidate:
        return Candidate(None, weight)


class RankLayout(Layout):
    """Low rank: both factors, or the weight where the map stays as it is."""

    def fault(self, site: Site, kept: int, candidate: Candidate, columns: Columns) -> str:
        if candidate.kept is not None:
            return "a weight without groups was asked, and some were named"
        found = None if candidate.factors is None else [tuple(factor.shape) for factor in candidate.factors]
        asked = None if kept == site.n_groups else [*self.shapes(site, kept)]
        if found != asked:
            return f"factors of shapes {asked} were asked, not {found}" if asked else "no factors were asked"
        if not all(bool(torch.isfinite(factor).all()) for factor in candidate.factors or ()):
            return f"a factor of rank {kept} is not finite"
        return ""

    def rounded(self, candidate: Candidate, dtype: torch.dtype) -> Candidate:
        if candidate.factors is None:
            return super().rounded(candidate, dtype)
        left, right = (factor.to(dtype) for factor in candidate.factors)
        return Candidate(None, self.product(left, right, candidate.weight.shape[1]), (left, right))

    def shapes(self, site: Site, kept: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of both factors."""
        return (site.d_out, kept), (kept, site.d_in)

    def product(self, left: Float[Tensor, "d_out m"], right: Float[Tensor, "k n"], d_in: int) -> Tensor:
        """The weight (d_out, d_in) that two factors stand for."""
        return product(left, right)

    def encode(self, site: Site, kept: int, candidate: Candidate) -> dict[str, Tensor]:
        if candidate.factors is None:
            return {"weight": candidate.weight.contiguous()}
        left, right = candidate.factors
        return {"left": left.contiguous(), "right": right.contiguous()}

    def decode(self, site: Site, kept: int, read: Callable[[str], Tensor]) -> Candidate:
        if kept == site.n_groups:
            return Candidate(None, read("weight"))
        left, right = read("left"), read("right")
        return Candidate(None, self.product(left, right, site.d_in), (left, right))

    def stored(self, site: Site, kept: int, dtype: torch.dtype) -> Stored:
        if kept == site.n_groups:
            return {"weight": (dtype, [site.d_out, site.d_in])}
        left, right = self.shapes(site, kept)
        return {"left": (dtype, left), "right": (dtype, right)}

    def width(self, site: Site, kept: int) -> int:
        return site.d_in

    def freed(self, site: Site, kept: int) -> int:
        return site.parameters(site.n_groups) - site.parameters(kept)

    def groups(self, site: Site, candidate: Candidate) -> Sequence[int]:
        return range(site.n_groups)

    def stand_in(self, site: Site, kept: int, weight: Tensor) -> Candidate:
        if kept == site.n_groups:
            return Candidate(None, weight)
        left, right = self.shapes(site, kept)
        return Candidate(None, weight, (weight.new_empty(left), weight.new_empty(right)))


class ValueLayout(RankLayout):
    """Narrower values: what reads them, and their bases; or the weight where they stay as they are."""

    def shapes(self, site: Site, kept: int) -> tuple[tuple[int, int], tuple[int, int]]:
        assert isinstance(site.form, Values)
        return (site.d_out, site.form.heads * kept), (site.form.kv_heads * kept, site.n_groups)

    def product(self, left: Float[Tensor, "d_out m"], right: Float[Tensor, "k n"], d_in: int) -> Tensor:
        return narrow_product(left, right, d_in // right.shape[1])


NEURONS = NeuronLayout()
LAYOUTS: Mapping[Units, Layout] = {
    "groups": GroupLayout(),
    "weights": SparseLayout(),
    "n:m": SparseLayout(),
    "low-rank": RankLayout(),
    "values": ValueLayout(),
}


def layout_of(site: Site) -> Layout:
    """The layout of what is removed at a site."""
    return NEURONS if site.experts else LAYOUTS[site.form.units]


def _packed(mask: Bool[Tensor, ...]) -> UInt8[Tensor, " bytes"]:
    """Eight to a byte, the first in its lowest bit."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(bits: UInt8[Tensor, " bytes"], count: int) -> Bool[Tensor, " count"]:
    return ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[:count].bool()
