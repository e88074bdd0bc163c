"""What a plain forward says, for tests of those that go block by block."""

from contextlib import ExitStack

import pytest
import torch


@pytest.fixture(scope="session")
def inputs_of():
    """What the linear maps of sites receive in a plain forward, with other weights in place where they are given."""

    @torch.no_grad()
    def inputs(model, adapter, sites, tokens, weights=None):
        caught, handles = {}, []
        for site in sites:
            linear = adapter.linear(adapter.blocks(model)[site.block], site)
            if weights is not None:
                linear.weight.copy_(weights[site])
            handles.append(
                linear.register_forward_pre_hook(
                    lambda _, x, site=site: caught.__setitem__(site, x[0].reshape(-1, site.d_in))
                )
            )
        with ExitStack() as stack:
            for block in adapter.blocks(model):
                stack.enter_context(adapter.exposed(block))
            model(tokens.ids)
        for handle in handles:
            handle.remove()
        return caught

    return inputs
