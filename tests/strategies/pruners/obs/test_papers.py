from dataclasses import asdict
from typing import Any

import pytest

from prunekit.plugins.registry import PRUNERS
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.obs import OBS

PAPERS: dict[str, dict[str, Any]] = {
    "osscar": {"aim": "dense", "search": "swap", "step": (10, 10), "head_step": 2},
    "slimgpt": {"score": "grouped-cholesky", "step": (8, 1024)},
    "spap": {"search": "penalty", "penalty": "set"},
    "tyr": {"step": (16, 16), "first_order": "absolute"},
    "ziplm": {},
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_is_obs_with_its_choices_and_any_of_them_can_be_changed(name: str) -> None:
    paper = PRUNERS.build(name)
    assert asdict(paper) == asdict(OBS(**PAPERS[name]))  # type: ignore[call-overload]
    assert PRUNERS.build(PRUNERS.spec(paper)) == paper
    assert PRUNERS.spec(paper)["name"] == name
    changed = PRUNERS.build({"name": name, "aim": "stream", "step": [2, 8]})
    assert asdict(changed) == asdict(OBS(**PAPERS[name] | {"aim": "stream", "step": (2, 8)}))  # type: ignore[call-overload]


def test_ziplm_is_the_plain_surgeon() -> None:
    layer = toy_layer(9)
    kept = [[c.kept for c in pruner.prune(layer, range(10))] for pruner in (OBS(), PRUNERS.build("ziplm"))]
    assert kept[0] == kept[1]
