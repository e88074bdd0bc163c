"""The claims of SliceGPT about its directions."""

import torch

from prunekit.testing import toy_stream
from prunekit_strategies.widths.slicegpt import SliceGPT


def test_what_is_lost_is_the_sum_of_the_deleted_eigenvalues_and_no_other_directions_lose_less():
    stream = toy_stream()
    gram, basis = stream.gram, SliceGPT().directions(stream)
    assert gram is not None
    values = torch.linalg.eigvalsh(gram).flip(0)
    torch.testing.assert_close(basis.T @ gram @ basis, values.diag())
    for kept in (1, 4, 11):
        lost = gram.trace() - (basis[:, :kept].T @ gram @ basis[:, :kept]).trace()
        torch.testing.assert_close(lost, values[kept:].sum())
        for seed in range(20):
            other, _ = torch.linalg.qr(
                torch.randn(12, kept, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            )
            assert gram.trace() - (other.T @ gram @ other).trace() > lost


def test_a_stream_in_few_directions_loses_nothing_when_the_others_go():
    stream = toy_stream(quirk="few directions")
    basis = SliceGPT().directions(stream)
    assert stream.gram is not None
    assert float((basis[:, 3:].T @ stream.gram @ basis[:, 3:]).trace()) < 1e-12 * float(stream.gram.trace())


def test_the_sign_of_a_direction_does_not_hang_on_the_decomposition():
    basis = SliceGPT().directions(toy_stream())
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
