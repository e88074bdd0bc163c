"""Two models side by side: what they receive and make is what they receive and make when run whole."""

import copy
from typing import Any

import pytest
import torch

from prunekit.calibration.twin import Twin, whole_parts
from prunekit.testing import toy_supernet, toy_tokens, toy_workpiece

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox"]


@torch.no_grad()
def watched(model, adapter, sites, tokens):
    """(input, output) of every site's linear map in a plain forward; only sites the model still has."""
    found, hooks = {}, []
    for site in sites:
        linear = adapter.linear(adapter.blocks(model)[site.block], site)
        hooks.append(
            linear.register_forward_hook(lambda _, x, y, site=site: found.__setitem__(site, (flat(x[0]), flat(y))))
        )
    model(tokens.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def flat(x):
    return x.reshape(-1, x.shape[-1])


def whole(here, part):
    return torch.cat([flat(part(i)) for i in range(len(here))])


@pytest.mark.parametrize("family", FAMILIES)
def test_both_streams_are_those_of_whole_models(family):
    tokens = toy_tokens()
    piece = toy_workpiece(toy_supernet(family), tokens=tokens)
    dense = watched(piece.dense, piece.adapter, piece.sites, tokens)
    small = watched(piece.model, piece.adapter, piece.sites, tokens)
    for here in Twin(piece, tokens, tokens=24):
        assert len(here) == 2
        torch.testing.assert_close(whole(here, here.dense_inputs), dense[here.site][0])
        torch.testing.assert_close(whole(here, here.inputs), small[here.site][0])
        torch.testing.assert_close(whole(here, here.made), small[here.site][1])
        torch.testing.assert_close(whole(here, lambda i, here=here: here.wanted(i, "dense")), dense[here.site][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_loop_changes_is_what_the_next_one_sees(family):
    tokens = toy_tokens()
    piece = toy_workpiece(toy_supernet(family), tokens=tokens)
    changed = copy.deepcopy(piece.model)
    for site in piece.sites:
        for linear in piece.adapter.maps(piece.adapter.blocks(changed)[site.block], site):
            linear.weight.data *= 0.5
    expected = watched(changed, piece.adapter, piece.sites, tokens)
    for here in Twin(piece, tokens):
        for linear in here.maps:
            linear.weight.data *= 0.5
        torch.testing.assert_close(whole(here, here.made), expected[here.site][1])


def test_sub_layers_that_were_lost_are_passed_by_and_add_nothing():
    net = toy_supernet()
    piece = toy_workpiece(net, plan=(0, 9, 2, 0, 0, 8))
    left = [site for site, groups in zip(piece.sites, piece.kept, strict=True) if groups]
    expected = watched(piece.model, piece.adapter, left, piece.tokens)
    met = [(here.site, whole(here, here.inputs)) for here in Twin(piece, piece.tokens)]
    assert [site for site, _ in met] == left
    for site, x in met:
        torch.testing.assert_close(x, expected[site][0])


def test_own_is_the_dense_sub_layer_behind_the_small_one():
    piece = toy_workpiece(toy_supernet())
    for here in Twin(piece, piece.tokens):
        mixed = copy.deepcopy(piece.model)  # dense from the present sub-layer on
        path = piece.adapter.holder(here.site) or ""
        block, dense = (piece.adapter.blocks(model)[here.site.block] for model in (mixed, piece.dense))
        block.set_submodule(path, copy.deepcopy(dense.get_submodule(path)))
        expected = watched(mixed, piece.adapter, [here.site], piece.tokens)[here.site][1]
        torch.testing.assert_close(whole(here, lambda i, here=here: here.wanted(i, "own")), expected)


def test_the_stream_wants_back_what_was_lost_before():
    """With every output as the stream wants it, the last hidden state is the dense model's."""
    piece = toy_workpiece(toy_supernet())
    blocks = piece.adapter.blocks(piece.dense)
    dense = []
    blocks[-1].register_forward_hook(lambda _, x, y: dense.append(y))
    piece.dense(piece.tokens.ids, use_cache=False)
    for here in Twin(piece, piece.tokens):
        wanted = here.wanted(0, "stream")
        lost = here.twin.dense.residual(0) - here.twin.small.residual(0)
        torch.testing.assert_close(wanted - lost, here.wanted(0, "dense"))
        if here.site is piece.sites[-1]:
            torch.testing.assert_close(here.twin.small.residual(0) + wanted, dense[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_single_weights_have_every_map_alone(family):
    tokens = toy_tokens()
    piece = toy_workpiece(toy_supernet(family, structure="weights"), tokens=tokens)
    dense = watched(piece.dense, piece.adapter, piece.sites, tokens)
    changed = copy.deepcopy(piece.model)
    for site in piece.sites:
        piece.adapter.linear(piece.adapter.blocks(changed)[site.block], site).weight.data *= 0.5
    expected = watched(changed, piece.adapter, piece.sites, tokens)
    twin, met = Twin(piece, tokens, tokens=24), []
    assert len(twin) == len(piece.sites)
    for here in twin:
        met.append(here.site)
        assert here.maps == [here.linear]
        here.linear.weight.data *= 0.5
        x, y = expected[here.site]
        torch.testing.assert_close(whole(here, here.inputs), x)
        torch.testing.assert_close(whole(here, here.entering), x)
        torch.testing.assert_close(whole(here, here.made), y)
        torch.testing.assert_close(whole(here, here.dense_inputs), dense[here.site][0])
        own = whole(here, lambda i, here=here: here.wanted(i, "own"))
        torch.testing.assert_close(own, here.dense_linear(x))
        aimed = whole(here, lambda i, here=here: here.wanted(i, "dense"))
        torch.testing.assert_close(aimed, dense[here.site][1])
        if piece.adapter.part(here.site) is None:
            assert torch.equal(aimed, whole(here, lambda i, here=here: here.wanted(i, "stream")))
    assert tuple(met) == piece.sites


def test_whole_parts_of_single_weights_are_attention_and_mlp():
    piece = toy_workpiece(toy_supernet(structure="weights"))
    parts = whole_parts(piece)
    expected = watched(piece.model, piece.adapter, parts.sites, piece.tokens)
    for here in Twin(parts, piece.tokens):
        torch.testing.assert_close(whole(here, here.made), expected[here.site][1])
        if here.site.kind == "mlp":
            gate, up, _ = here.maps
            x = here.entering(0)
            torch.testing.assert_close(torch.nn.functional.silu(gate(x)) * up(x), here.inputs(0))


def test_where_a_norm_comes_after_the_sum_the_stream_is_no_sum():
    net = toy_supernet("opt")
    piece = toy_workpiece(net)
    for model in (piece.dense, piece.model):
        block: Any
        for block in piece.adapter.blocks(model):
            block.do_layer_norm_before = False
    for here in Twin(piece, piece.tokens):
        assert torch.equal(here.wanted(0, "stream"), here.wanted(0, "dense"))


def test_gradients_reach_the_maps_of_the_present_sub_layer_and_no_other():
    piece = toy_workpiece(toy_supernet())
    everything = list(piece.model.parameters())
    for here in Twin(piece, piece.tokens):
        for parameter in everything:
            parameter.requires_grad_(True)
        norms = [p for name, p in here.block.named_parameters() if "norm" in name]
        mine = [linear.weight for linear in here.maps]
        found = torch.autograd.grad(here.made(0).sum(), everything, allow_unused=True)
        reached = {id(p) for p, g in zip(everything, found, strict=True) if g is not None}
        assert {id(p) for p in mine} <= reached <= {id(p) for p in (*mine, *norms)}
