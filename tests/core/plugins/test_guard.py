"""What plug-ins were given is as it was, also behind the back of tensors' versions."""

import pytest
import torch

from prunekit.errors import PluginError
from prunekit.plugins.guard import IN_CACHE, unchanged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("size", [1, 7, 8, IN_CACHE + 12, 2 * IN_CACHE + 1])
def test_a_value_that_changes_anywhere_is_seen(dtype: torch.dtype, size: int) -> None:
    given = torch.zeros(size + 1).to(dtype)[1:]  # its storage begins before it
    for place in {0, size // 2, size - 1}:
        with pytest.raises(PluginError, match="changed given"), unchanged(object(), values=True, given=given):
            given.data[place] = not bool(given[place])
    with unchanged(object(), values=True, given=given):
        given.sum()


def test_values_that_change_places_are_seen() -> None:
    given = torch.arange(16, dtype=torch.float32)
    with pytest.raises(PluginError, match="changed given"), unchanged(object(), values=True, given=given):
        given.data[[3, 9]] = given.data[[9, 3]]
