"""Candidates come back as they were put, or not at all."""

import pytest
import torch

from prunekit.layer.candidates import Candidate
from prunekit.search.store import CandidateStore, DamagedStore
from prunekit.space.forms import WEIGHTS
from prunekit.space.sites import Site
from prunekit.system.files import read_state

SITE = Site("model.layers.0.mlp.down_proj", 0, "mlp", n_groups=4, group_size=2, params_per_group=1)
SPREAD = Site("model.layers.0.self_attn.o_proj", 0, "attention", n_groups=2, group_size=4, params_per_group=1, spread=2)


def candidate(site, kept):
    weight = torch.zeros(3, site.d_in)
    columns = site.columns(kept)
    weight[:, columns] = torch.arange(1.0, 3 * len(columns) + 1).reshape(3, -1)
    return Candidate(tuple(kept), weight)


@pytest.mark.parametrize("site", [SITE, SPREAD], ids=["contiguous", "spread"])
def test_what_is_put_is_got(tmp_path, site):
    rungs = [candidate(site, range(k)) for k in range(site.n_groups + 1)]
    CandidateStore(tmp_path, {"a": 1}).put(site, rungs, [1.0 - k / 4 for k in range(len(rungs))])
    store = CandidateStore(tmp_path, {"a": 1})
    assert site in store
    for k, rung in enumerate(rungs):
        found = store.get(site, k)
        assert found.kept == rung.kept
        assert torch.equal(found.weight, rung.weight)
    assert store.errors(site)[0] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 8), (1, 1)], ids=str)
def test_single_weights_are_got_as_they_were_put(tmp_path, dtype, shape):
    site = Site("model.layers.0.mlp.up_proj", 0, "linear", shape[1], 1, shape[0], d_out=shape[0], form=WEIGHTS)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    rungs = [Candidate(None, whole * (torch.arange(shape[1]) < k)) for k in range(shape[1] + 1)]
    CandidateStore(tmp_path, {}).put(site, rungs, [0.0] * len(rungs), keeps=range(len(rungs)))
    store = CandidateStore(tmp_path, {})
    for k, rung in enumerate(rungs):
        found = store.get(site, k)
        assert found.kept is None
        assert torch.equal(found.weight, rung.weight)
        assert found.weight.dtype == dtype


def test_a_mask_takes_one_bit_of_each_weight(tmp_path):
    site = Site("model.layers.0.mlp.up_proj", 0, "linear", 640, 1, 100, d_out=100, form=WEIGHTS)
    half = torch.ones(100, 640) * (torch.arange(640) % 2)
    CandidateStore(tmp_path, {}).put(site, [Candidate(None, half)], [0.0], keeps=[320])
    assert (tmp_path / f"{site.name}.safetensors").stat().st_size < 64_000 // 8 + 32_000 * 4 + 300


def test_what_was_measured_comes_back_signal_by_signal(tmp_path):
    for site, signals, scores in ((SITE, (0.1, 3.0), (1.0, 0.1, 2.0, 1e-300)), (SPREAD, (1 / 3, -4.0), (5.0, 6.0))):
        CandidateStore(tmp_path, {}).put(site, [candidate(site, [1])], [0.5], signals, scores)
    store = CandidateStore(tmp_path, {})
    assert store.measured([SITE, SPREAD], scores=False) == (((0.1, 1 / 3), (3.0, -4.0)), None)
    assert store.measured([SPREAD, SITE], scores=True)[1] == ((5.0, 6.0), (1.0, 0.1, 2.0, 1e-300))


def test_only_kept_columns_are_on_disk(tmp_path):
    CandidateStore(tmp_path, {}).put(SITE, [candidate(SITE, [1])], [0.5])
    assert (tmp_path / f"{SITE.name}.safetensors").stat().st_size < 3 * SITE.d_in * 4 + 200


def test_a_count_that_was_not_put_is_an_error_that_lists_those_that_were(tmp_path):
    store = CandidateStore(tmp_path, {})
    store.put(SITE, [candidate(SITE, [1])], [0.5])
    with pytest.raises(KeyError, match=r"there are \[1\]"):
        store.get(SITE, 3)


def test_a_changed_file_is_refused(tmp_path):
    CandidateStore(tmp_path, {}).put(SITE, [candidate(SITE, [1])], [0.5])
    file = tmp_path / f"{SITE.name}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedStore, match="damaged"):
        CandidateStore(tmp_path, {}).get(SITE, 1)


def test_the_store_of_another_pass_is_refused(tmp_path):
    CandidateStore(tmp_path, {"centre": [1]}).put(SITE, [candidate(SITE, [1])], [0.5])
    with pytest.raises(DamagedStore, match="another calibration pass"):
        CandidateStore(tmp_path, {"centre": [2]})


def test_a_writer_that_dies_before_the_manifest_leaves_the_site_out(tmp_path, monkeypatch):
    store = CandidateStore(tmp_path, {})
    store.put(SITE, [candidate(SITE, [1])], [0.5])
    monkeypatch.setattr("prunekit.search.store.write_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.put(SPREAD, [candidate(SPREAD, [1])], [0.5])
    again = CandidateStore(tmp_path, {})
    assert SITE in again
    assert SPREAD not in again
    assert SPREAD.name not in read_state(tmp_path / "manifest.json")["sites"]
