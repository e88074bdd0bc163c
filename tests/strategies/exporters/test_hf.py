"""What transformers cannot load without prunekit is said before any work."""

import pytest

from prunekit import Order, WrongInput
from prunekit.models.adapters.find import adapter_for
from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import llama_like
from prunekit_strategies.exporters.hf import HF


class Granite(Transformer):
    """A family of a third party."""

    family = llama_like("granite", "Granite")
    layers = "model.layers"
    final = ("model.norm", "lm_head")


def test_the_code_of_a_strange_family_is_not_bundled() -> None:
    with pytest.raises(WrongInput, match="the code of Granite models is not prunekit's own"):
        HF().check(Order(Granite(), "groups", "bundled"))
    HF().check(Order(Granite(), "groups", "import"))
    for model_type in ("llama", "mamba"):
        HF().check(Order(adapter_for(model_type), "weights", "bundled"))
