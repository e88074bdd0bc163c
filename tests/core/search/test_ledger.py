"""A ledger is written once and replayed ever after."""

import math

import pytest

from prunekit.search.ledger import Ledger, LedgerMismatch

QUESTION = {"kind": "question", "walk": 0, "allocation": [1, 2], "tokens": 64}


def written(path):
    ledger = Ledger(path)
    ledger.note({"kind": "space"})
    assert ledger.recall(QUESTION) is None
    ledger.answer(QUESTION, 0.1 + 0.2)
    ledger.answer(QUESTION | {"tokens": 8}, math.inf)
    return ledger


def test_a_second_run_is_told_what_the_first_one_learnt(tmp_path):
    written(tmp_path / "ledger.jsonl")
    before = (tmp_path / "ledger.jsonl").read_bytes()
    again = Ledger(tmp_path / "ledger.jsonl")
    again.note({"kind": "space"})
    assert again.recall(QUESTION) == 0.1 + 0.2
    assert again.recall(QUESTION | {"tokens": 8}) == math.inf
    assert again.recall(QUESTION) is None
    assert (again.tokens, again.questions) == (72, 2)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_another_conversation_is_refused(tmp_path):
    written(tmp_path / "ledger.jsonl")
    again = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(LedgerMismatch, match="line 1"):
        again.note({"kind": "other space"})


def test_half_a_line_of_a_killed_writer_is_forgotten(tmp_path):
    path = tmp_path / "ledger.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind":"quest')
    again = Ledger(path)
    again.note({"kind": "space"})
    again.recall(QUESTION)
    again.recall(QUESTION | {"tokens": 8})
    assert again.recall(QUESTION) is None
    assert path.read_bytes() == whole


def test_what_another_program_said_is_said_again(tmp_path):
    def once(ledger, *answers):
        said = iter(answers)
        return [ledger.once({"kind": "note", "n": n}, lambda: next(said)) for n in range(2)]

    replies = [{"reply": 'ä "\ud800"', "parts": (1, 2)}, None]
    heard = once(Ledger(tmp_path / "l"), *replies)
    assert heard == [{"reply": 'ä "\ud800"', "parts": [1, 2]}, None]  # as a second run will read it
    assert once(Ledger(tmp_path / "l")) == heard
    with pytest.raises(LedgerMismatch, match="line 1"):
        Ledger(tmp_path / "l").once({"kind": "note", "n": 7}, lambda: 0)


def test_what_could_not_be_answered_is_asked_again(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Ledger(tmp_path / "l").once({"kind": "note"}, lambda: 1 / 0)
    assert Ledger(tmp_path / "l").once({"kind": "note"}, lambda: 1) == 1


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("damage", ["bit", "garbage", "gone", "nan", "deep", "list"])
def test_from_a_changed_line_on_all_is_asked_anew(tmp_path, line, damage):
    path = tmp_path / "ledger.jsonl"
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    whole = b"".join(lines)
    lines[line] = {
        "bit": lines[line].replace(b"k", b"j", 1),
        "garbage": b"\xff\n",
        "gone": b"",
        "nan": lines[line].replace(b"0.30000000000000004", b"NaN"),
        "deep": b"[" * 100_000 + b"\n",
        "list": b"[]\n",
    }[damage]
    changed = b"".join(lines) != whole
    path.write_bytes(b"".join(lines))
    again = Ledger(path)
    assert again.damaged == (line + 1 if changed and not (damage == "gone" and line == 2) else None)
    assert written_again(again) == (0.1 + 0.2, math.inf)
    assert path.read_bytes() == whole


def written_again(ledger):
    ledger.note({"kind": "space"})
    found = []
    for question, loss in ((QUESTION, 0.1 + 0.2), (QUESTION | {"tokens": 8}, math.inf)):
        if (said := ledger.recall(question)) is None:
            ledger.answer(question, said := loss)
        found.append(said)
    return tuple(found)
