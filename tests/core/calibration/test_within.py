"""What reaches a layer behind pruned blocks: through the pruned maps of its own block, or through its dense ones."""

import copy
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from prunekit import LocalPruner
from prunekit.calibration.fill import Carry, build
from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.pruner import Within
from prunekit.search.store import CandidateStore
from prunekit.space.budgets import Budget
from prunekit.space.forms import parse_form
from prunekit.space.ladders import Space
from prunekit.system.progress import Progress
from prunekit.testing import tiny, toy_tokens


@dataclass(frozen=True)
class Listening(LocalPruner):
    """Halves every weight it is asked for, and keeps what it was told of its inputs."""

    structures = frozenset({"groups", "weights"})
    within: Within = "block"
    heard: dict[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def prune(self, layer, keeps):
        self.heard[layer.name] = layer.gram.clone()
        if layer.structure == "groups":
            return [layer.masked(range(keep)) for keep in keeps]
        columns = torch.arange(layer.d_in) < torch.tensor(keeps)[:, None]
        return [layer.sparse(row.expand_as(layer.weight)) for row in columns]


def listen(seen, name, _, inputs):
    seen[name] = inputs[0].flatten(0, -2)


def heard(family, structure, within, place, carry: Carry = "centre"):
    """(by site: the gram that the pruner was told, that of the dense block behind pruned ones by hand)."""
    model, adapter, tokens = tiny(family, num_hidden_layers=3), adapter_for(family), toy_tokens()
    sites = adapter.sites_of(model, parse_form(structure))
    space = Space.whole(sites, Budget.keeping(0.5, sites))
    centre, pruner, store = space.uniform(), Listening(within=within), CandidateStore(place, {})
    one = space.zoomed(centre, reach=0)
    build(
        model, adapter, one, centre, pruner, tokens, store, carry=carry, dtype=torch.float64, progress=Progress()
    )  # fmt: skip
    found, small = {}, copy.deepcopy(model)
    for block in range(3):
        here = [(site, kept) for site, kept in zip(sites, centre, strict=True) if site.block == block]
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            adapter.linear(adapter.blocks(small)[block], site).register_forward_pre_hook(
                partial(listen, seen, site.name)
            )
            for site, _ in here
        ]
        with torch.no_grad():
            small(tokens.ids)
        for hook in hooks:
            hook.remove()
        found |= {name: (pruner.heard[name], x.T @ x / len(x)) for name, x in seen.items()}
        for site, kept in here:
            adapter.linear(adapter.blocks(small)[block], site).weight.data = store.get(site, kept).weight
    return found


@pytest.mark.parametrize("structure", ["groups", "weights"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_within_block_a_layer_receives_what_the_dense_block_does_behind_pruned_ones(family, structure, tmp_path):
    found = heard(family, structure, "block", tmp_path)
    assert len(found) >= 6
    for name, (told, by_hand) in found.items():
        torch.testing.assert_close(told, by_hand, msg=name)


def test_within_map_it_is_reached_through_pruned_maps(tmp_path):
    found = heard("llama", "weights", "map", tmp_path)
    same = {name for name, (told, by_hand) in found.items() if torch.allclose(told, by_hand)}
    assert {name.rpartition(".")[2] for name in same} == {"q_proj", "k_proj", "v_proj"}  # the first of every block


def test_where_nothing_is_carried_both_are_the_same(tmp_path):
    block, map_ = (heard("llama", "weights", within, tmp_path / within, "dense") for within in ("block", "map"))
    for name, (told, _) in block.items():
        assert torch.equal(told, map_[name][0])
