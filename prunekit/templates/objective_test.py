"""The promises of every objective, and the claim of this one."""

from prunekit.templates.objective import Template
from prunekit.testing import ObjectiveSuite, toy_supernet, toy_tokens


class TestTemplate(ObjectiveSuite):
    plugin = Template()


def test_the_dense_model_agrees_with_itself_and_more_tokens_are_easier() -> None:
    net, tokens = toy_supernet(), toy_tokens()
    sites = net.space.sites
    dense, half = tuple(site.n_groups for site in sites), tuple(site.n_groups // 2 for site in sites)
    assert Template().loss(net, dense, tokens) == 0
    assert Template(top=8).loss(net, half, tokens) <= Template().loss(net, half, tokens)
