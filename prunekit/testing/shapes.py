"""Layers of any shape, for what suites promise of all of them."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prunekit.testing.layers import QUIRKS

# n_groups, group_size, d_out, seed of layers with two columns that are one, whose moments have a factor or none as the
# processor rounds
SINGULAR = [(3, 1, 2, 0), (5, 1, 1, 0), (6, 1, 1, 305), (6, 1, 1, 308), (6, 2, 1, 308), (3, 1, 1, 152), (2, 1, 1, 1)]


def on_any_shape(test: Callable[..., None]) -> Callable[..., None]:
    """Call a test of a suite with n_groups, group_size, d_out, quirk, seed and damping: thirty, always the same.

    Where the hypothesis profile is called `random`, as many as it says, and always others.
    """
    shaped = given(
        n_groups=st.integers(1, 7),
        group_size=st.integers(1, 4),
        d_out=st.integers(1, 6),
        quirk=st.sampled_from(QUIRKS),
        seed=st.integers(0, 2**31),
        damping=st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
    )(test)
    for n_groups, group_size, d_out, seed in SINGULAR:
        shaped = example(
            n_groups=n_groups, group_size=group_size, d_out=d_out, quirk="duplicate", seed=seed, damping=0.0
        )(shaped)
    random = settings.get_current_profile_name() == "random"
    return settings(
        max_examples=settings.default.max_examples if random else 30,  # type: ignore[union-attr]
        deadline=None,
        derandomize=not random,
        database=None,
        # one class serves many subclasses, and the same examples for all of them are what we want
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )(shaped)
