"""What a result is verified with, and what it took."""

import torch

from prunekit.run.clock import Clock
from prunekit.run.results import make_probe
from prunekit.testing import tiny, toy_tokens


def test_an_export_is_verified_in_float32_whatever_it_is_stored_in() -> None:
    model, tokens = tiny("llama").bfloat16(), toy_tokens(windows=2)
    ids, logits = make_probe(model, tokens)
    assert torch.equal(ids, tokens.ids)
    assert torch.equal(logits, model.float()(tokens.ids, use_cache=False).logits)
    assert logits.dtype == torch.float32


def test_what_is_shared_counts_for_everybody() -> None:
    shared = Clock()
    one, other = Clock(shared), Clock(shared)
    for clock, seconds in ((shared, 4.0), (one, 2.0), (one, 1.0)):
        clock.add("prune", seconds)
    other.add("search", 0.5)
    assert one.seconds == {"prune": 7.0}
    assert other.seconds == {"prune": 4.0, "search": 0.5}
    assert shared.seconds == {"prune": 4.0}
