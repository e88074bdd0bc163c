"""The promises of every pruner, and the claim of this one."""

import pytest

from prunekit.templates.pruner import Template
from prunekit.testing import PrunerSuite, toy_layer


class TestTemplate(PrunerSuite):
    plugin = Template()


class TestTemplateWithoutRefit(PrunerSuite):
    plugin = Template(refit=False)


def test_the_score_is_the_power_of_the_columns() -> None:
    layer = toy_layer(n_groups=6, group_size=4)
    columns = layer.columns([2])
    weight, power = layer.weight.double()[:, columns], layer.gram.diagonal().double()[columns]
    assert float(Template().scores(layer)[2]) == pytest.approx(float((weight.square() * power).sum()))
