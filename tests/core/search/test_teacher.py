"""What the dense model says is heard once, and is the same wherever it is kept."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch

import prunekit
from prunekit.data.tokens import TokenBatch
from prunekit.engine.worker import Worker
from prunekit.models import blocks as blocks_of
from prunekit.plugins.dense import Dense
from prunekit.run import session, stages
from prunekit.search import supernet
from prunekit.search.supernet import Supernet
from prunekit.search.teacher import Teacher
from prunekit.system.memory import Shares
from prunekit.testing import toy_supernet, toy_tokens
from prunekit_objectives.divergence import Divergence
from prunekit_objectives.robust import Robust

K = 7
CHUNK = 3 * 12 * K * 8  # bytes of the most probable tokens of a whole chunk


@pytest.fixture(autouse=True)
def unequal_pieces(monkeypatch):
    """Of five windows: chunks of three and two, in pieces of two, one, and two."""
    monkeypatch.setattr(blocks_of, "TOKENS_AT_ONCE", 36)
    monkeypatch.setattr(supernet, "LOGITS_AT_ONCE", 2 * 12 * 61)


@pytest.fixture
def runs(monkeypatch):
    """Windows that the dense model has read, run by run."""
    seen, run = list[int](), Supernet._run

    def spy(net, allocations, batch, depths):
        seen.extend([len(batch)] * (None in allocations))
        return run(net, allocations, batch, depths)

    monkeypatch.setattr(Supernet, "_run", spy)
    return seen


def other(net: Supernet) -> Supernet:
    """Over the same model, after another walk."""
    space = net.space.zoomed(net.space.uniform(), reach=0)
    return Supernet(net.model, net.adapter, space, net.errors, net.store, net.shares, net.teacher)


def test_the_dense_top_is_the_top_of_the_dense_model_in_the_pieces_of_logits():
    net, batch = toy_supernet(), toy_tokens(windows=5)
    tops = list(net.dense_top(batch, K))
    assert (
        [len(top.ids) for top in tops] == [len(ids) for ids, _ in net.logits(net.space.uniform(), batch)] == [2, 1, 2]
    )
    expected = net.model(batch.ids).logits.float().log_softmax(-1).topk(K)
    torch.testing.assert_close(torch.cat([top.log_probs for top in tops]), expected.values)
    assert torch.equal(torch.cat([top.ids for top in tops]).long(), expected.indices)


@pytest.mark.parametrize(
    ("memory", "disk", "read"),
    [
        (1 << 30, 0, [5]),  # windows that the dense model reads for three questions
        (0, 1 << 30, [5]),
        (CHUNK // 2, CHUNK, [5, 2, 2]),  # of the first chunk, some here, some there; then neither has place
        (CHUNK, 0, [5, 2, 2]),
        (0, 2 * CHUNK // 3, [5, 3, 3]),  # what is too large leaves its place to others
        (0, 0, [5, 5, 5]),
    ],
)
def test_bounds_change_what_is_made_anew_and_no_bit(memory, disk, read, runs, tmp_path):
    net, batch = toy_supernet(), toy_tokens(windows=5)
    plan, objective = net.space.uniform(), Divergence(K)
    expected, tops = objective.loss(net, plan, batch), list(net.dense_top(batch, K))
    net.teacher = teacher = Teacher(Shares(teacher=memory, teacher_disk=disk), tmp_path / "teacher")
    net.prefetch([plan], [batch])
    runs.clear()
    assert [objective.loss(net, plan, batch) for _ in range(2)] == [expected] * 2
    for mine, once in zip(net.dense_top(batch, K), tops, strict=True):
        assert torch.equal(mine.ids, once.ids)
        assert torch.equal(mine.log_probs, once.log_probs)
    assert runs == read
    assert teacher.room.held <= memory
    assert teacher.room.spilled <= disk
    assert bool(teacher.room.spilled) == (tmp_path / "teacher").exists()


def test_files_are_gone_with_the_teacher(tmp_path):
    net = toy_supernet()
    net.teacher = Teacher(Shares(teacher=0), tmp_path)
    list(net.dense_top(toy_tokens(windows=5), K))
    assert len(list(tmp_path.iterdir())) == 6  # ids and logarithms of three pieces
    del net
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_whole_chunks_of_a_longer_batch_are_known(runs):
    net, batch = toy_supernet(), toy_tokens(windows=8)
    list(net.dense_top(batch.first(5 * 12), K))
    long = list(net.dense_top(batch, K))
    assert runs == [5, 5]  # all of five windows, then all but the first three of eight
    fresh = list(toy_supernet().dense_top(batch, K))
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(long, fresh, strict=True))


def test_windows_that_come_twice_stay_in_order(runs):
    net, three = toy_supernet(), toy_tokens(windows=3)
    twice = TokenBatch(torch.cat([three.ids, three.ids, toy_tokens(windows=2, seed=1).ids]), "twice")
    first, again = list(net.dense_top(twice, K)), list(net.dense_top(twice, K))
    for tops in (first, again):
        logits = [logits for _, logits in net.dense_logits(twice)]
        for top, expected in zip(tops, logits, strict=True):
            assert torch.equal(top.log_probs, expected.log_softmax(-1).topk(K).values)
    assert runs == [8, 8, 8]


def test_more_than_the_vocabulary_is_the_vocabulary(runs):
    net, batch = toy_supernet(), toy_tokens()
    assert {top.ids.shape[-1] for k in (61, 62, 10_000) for top in net.dense_top(batch, k)} == {61}
    assert runs == [4]


def test_supernets_over_one_model_make_nothing_twice(runs):
    net, batch = toy_supernet(), toy_tokens(windows=4, sources=2)
    plan, objective = net.space.uniform(), Robust(Divergence(K))
    loss = objective.loss(net, plan, batch)
    assert runs == [2, 2]  # of each source
    net.rest()
    walked = other(net)
    assert objective.loss(walked, plan, batch) == loss
    assert runs == [2, 2]
    assert walked.teacher.losses.keys() == {(Divergence(K), part.digest) for part in batch.parts.values()}


def test_a_worker_keeps_what_it_has_heard_when_it_meets_another_walk(runs):
    net, batch = toy_supernet(), toy_tokens()
    worker = Worker(Dense(net.model, None, net.adapter, torch.float64, "toy", ""))
    for each in (net, other(net)):
        worker.open_supernet(each.space, each.errors, each.store)
        found = worker.judge(Divergence(K), [net.space.uniform()], batch)
        assert found == [Divergence(K).loss(toy_supernet(), net.space.uniform(), batch)]
    assert runs == [4] * 3  # and those of two others that judge it alone


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_the_dense_model_is_heard_once_for_all_walks_of_a_family(memory, saved_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_of, "TOKENS_AT_ONCE", 128)
    planned, calibrate, keep = session.planned, stages.Run.calibrate, Teacher.keep
    heard, files, labels = Counter[str](), list[bool](), list[str]()

    def kept(teacher, digest, k, pieces):
        keep(teacher, digest, k, pieces)
        heard[digest] += 1
        files.append(any((tmp_path / "out.partial" / "teacher").glob("*")))

    def calibrating(run, space, centre, label, *rest, **options):
        labels.append(label)
        return calibrate(run, space, centre, label, *rest, **options)

    def bounded(*args, **options):
        plan = planned(*args, **options)
        return replace(plan, shares=replace(plan.shares, teacher=memory))

    monkeypatch.setattr(Teacher, "keep", kept)
    monkeypatch.setattr(stages.Run, "calibrate", calibrating)
    monkeypatch.setattr(session, "planned", bounded)
    tyr = {"name": "tyr", "inner": {"name": "uniform"}, "stride": 0.25, "last_stride": 0.125}  # two walks
    made = prunekit.prune(
        saved_tiny(), output=tmp_path / "out", recipe="fast", quiet=True, verify=False, rebuild=True,
        sparsity=[0.3, 0.5], allocator=tyr, objective="divergence", pruner="magnitude", data__dataset="python-docs",
        data__seqlen=32, data__search_tokens=256, data__calibration_tokens=128, data__evaluation_tokens=128,
    )  # fmt: skip
    assert len(made.rows) == 2
    assert sorted(heard.values()) == [1, 1]  # of two chunks
    assert labels == ["prune 1", "prune 2", "rebuild for 0.3", "rebuild for 0.5"]
    assert set(files) == {memory == 0}
    assert not (tmp_path / "out.partial").exists()
