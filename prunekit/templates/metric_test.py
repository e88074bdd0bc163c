"""The promises of every metric, and the claim of this one."""

import prunekit as pk
from prunekit.templates.metric import Template
from prunekit.testing import MetricSuite
from prunekit.testing.spaces import sites_of


class TestTemplate(MetricSuite):
    plugin = Template()


def test_attention_is_dearer_than_as_many_parameters_of_the_mlp() -> None:
    attention, mlp = sites_of(1, attention=(4, 10), mlp=(4, 10))
    budget = pk.Budget.keeping(0.5, [attention, mlp], metric=Template(attention=3))
    assert (budget.price(attention, 2), budget.price(mlp, 2)) == (60, 20)
    assert budget.limit == 80  # of 120 and 40
