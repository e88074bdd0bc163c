"""What is kept of the judged network says, of any engine, whether it answers the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.errors import WrongInput
from prunekit.export.compare import Row, compare
from prunekit.export.record import FOLDER, NUMBERS, Record, continue_greedily
from prunekit.plugins.exporter import Response
from prunekit.testing import tiny

ALLOWED = 1e-4


def a_record(windows: int = 3, length: int = 12, vocabulary: int = 50) -> Record:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (windows, length), generator=draw)
    logits = torch.randn(windows, length, vocabulary, generator=draw)
    continued = ids[0, :4], torch.tensor([7, 8, 9]), torch.tensor([1.0, ALLOWED, 1.0])
    return Record.of(ids, logits, torch.bfloat16, 123, continued)


def honest(record: Record) -> Response:
    """An engine that answers just the same."""
    return Response(record.logprobs.clone(), record.inquiry.tokens[..., 1].clone(), record.continuation.clone(), 123, 7)


def differing(rows: list[Row]) -> list[str]:
    return [row.what for row in rows if row.agrees is False]


def test_a_record_has_the_next_tokens_and_the_likeliest_with_their_log_probabilities() -> None:
    ids, logits = torch.tensor([[3, 1, 2]]), torch.randn(1, 3, 20)
    record = Record.of(ids, logits, torch.float32, 1)
    expected = logits.log_softmax(-1)
    assert record.inquiry.tokens.shape == (1, 3, 9)
    assert record.inquiry.tokens[0, :2, 0].tolist() == [1, 2]
    torch.testing.assert_close(record.logprobs, expected.gather(-1, record.inquiry.tokens))
    best = expected.topk(2, -1).values
    torch.testing.assert_close(record.gaps, best[..., 0] - best[..., 1])
    assert record.inquiry.new_tokens == 0


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = a_record()
    record.write(tmp_path)
    found = Record.read(tmp_path)
    assert found is not None
    pairs = [(record.inquiry.ids, found.inquiry.ids), (record.inquiry.tokens, found.inquiry.tokens)]
    pairs += [(record.inquiry.prompt, found.inquiry.prompt), (record.continuation, found.continuation)]
    pairs += [(record.logprobs, found.logprobs), (record.margins, found.margins)]
    assert all(torch.equal(one, other) for one, other in pairs)
    assert (found.dtype, found.parameters, found.inquiry.new_tokens) == ("bfloat16", 123, 3)
    first = (tmp_path / FOLDER / NUMBERS).read_bytes()
    record.write(tmp_path)
    assert (tmp_path / FOLDER / NUMBERS).read_bytes() == first


def test_a_record_is_as_small_for_a_large_vocabulary(tmp_path: Path) -> None:
    a_record(8, 128, vocabulary=16).write(tmp_path)
    small = (tmp_path / FOLDER / NUMBERS).stat().st_size
    a_record(8, 128, vocabulary=5000).write(tmp_path)
    assert (tmp_path / FOLDER / NUMBERS).stat().st_size == small < 100_000


def test_a_record_that_is_no_record_is_refused_in_a_sentence(tmp_path: Path) -> None:
    assert Record.read(tmp_path) is None
    a_record().write(tmp_path)
    file = tmp_path / FOLDER / NUMBERS
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(WrongInput, match=r"judged/answers\.safetensors cannot be read"):
        Record.read(tmp_path)


def test_the_same_answers_agree() -> None:
    record = a_record()
    rows = compare(record, honest(record), ALLOWED)
    assert [row.what for row in rows] == [
        "parameters", "tensors in the files", "log-probabilities", "likeliest tokens", "greedy tokens"
    ]  # fmt: skip
    assert all(row.agrees for row in rows)


@pytest.mark.parametrize("off", [0.9 * ALLOWED, 1.2 * ALLOWED, float("inf")])
def test_one_log_probability_that_is_off_is_found(off: float) -> None:
    record = a_record()
    answer = honest(record)
    answer.logprobs[1, 5, 3] += off
    assert differing(compare(record, answer, ALLOWED)) == (["log-probabilities"] if off > ALLOWED else [])


def test_what_an_engine_does_not_tell_is_not_compared() -> None:
    record = a_record()
    silent = replace(honest(record), parameters=None, tensors=None)
    silent.logprobs[..., 4:] = float("nan")
    rows = compare(record, silent, ALLOWED)
    assert [row.what for row in rows] == ["log-probabilities", "likeliest tokens", "greedy tokens"]
    assert all(row.agrees for row in rows)
    silent.logprobs[:] = float("nan")
    assert "log-probabilities" not in [row.what for row in compare(record, silent, ALLOWED)]


def test_another_likeliest_token_differs_unless_two_were_as_likely() -> None:
    record = a_record()
    answer = honest(record)
    answer.likeliest[0, 4] = record.inquiry.tokens[0, 4, 2]  # the second
    assert differing(compare(record, answer, ALLOWED)) == ["likeliest tokens"]
    record.logprobs[0, 4, 2] = record.logprobs[0, 4, 1] - ALLOWED  # as near as rounding reaches
    answer.logprobs[0, 4] = record.logprobs[0, 4]
    assert differing(compare(record, answer, ALLOWED)) == []


@pytest.mark.parametrize(
    ("continuation", "agrees"),
    [
        pytest.param([7, 8, 9], True, id="the same"),
        pytest.param([7, 1, 2], True, id="from a near-tie on"),
        pytest.param([1, 8, 9], False, id="at once"),
        pytest.param([7, 8, 1], False, id="behind the near-tie"),
        pytest.param([7, 8], False, id="shorter"),
    ],
)
def test_greedy_tokens_agree_as_far_as_no_near_tie_leads_elsewhere(continuation: list[int], agrees: bool) -> None:
    record = a_record()
    answer = replace(honest(record), continuation=torch.tensor(continuation))
    assert differing(compare(record, answer, ALLOWED)) == ([] if agrees else ["greedy tokens"])


def test_other_parameters_differ() -> None:
    record = a_record()
    assert differing(compare(record, replace(honest(record), parameters=124), ALLOWED)) == ["parameters"]


def test_the_continuation_is_what_transformers_generates_with_its_cache() -> None:
    model: Any = tiny("qwen3")
    window = torch.randint(61, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompt, new, margins = continue_greedily(lambda ids: model(ids, use_cache=False).logits, window)
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": len(new)}
    made = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **greedy)
    assert torch.equal(made[0, len(prompt) :], new)
    assert (len(prompt), len(new), len(margins)) == (20, 16, 16)
    assert bool((margins >= 0).all())
