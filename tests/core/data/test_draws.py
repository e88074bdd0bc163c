import gzip
import hashlib
import json
import os
import struct
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.data import sources
from prunekit.data.blends import in_shares
from prunekit.data.draws import Draws, draw, draw_evaluation
from prunekit.data.spec import DataSpec
from prunekit.data.tokens import TokenBatch, overlap
from prunekit.data.windows import LEAST, POOL
from prunekit.errors import WrongInput
from prunekit.system.progress import Progress


class Letters:
    """One token per character, its code point; ids of consecutive windows of `numbered` never repeat."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        assert not add_special_tokens or len(text) < 10  # that is only to see what it adds
        assert len(text) <= sources.SLICE
        return [ord(letter) for letter in text]


class Beginning(Letters):
    """It puts BOS in front of a text, as that of Llama 2 does, and something behind it."""

    bos_token_id = 1

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        ids = super().encode(text, add_special_tokens=add_special_tokens, verbose=verbose)
        return [1, *ids, 2] if add_special_tokens else ids


class Heard(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def numbered(n: int) -> str:
    """n different characters, none of which is a line end or a surrogate."""
    return "".join(chr(0x4E00 + i) for i in range(n))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "numbered.txt"
    path.write_text(numbered(20_000), encoding="utf-8")
    return path


def spec(
    path: Path | str, calibration: int = 64, search: int = 32, evaluation: int = 16, seqlen: int = 8, **more: Any
) -> DataSpec:
    return DataSpec(
        dataset=str(path),
        calibration_tokens=calibration,
        search_tokens=search,
        evaluation_tokens=evaluation,
        seqlen=seqlen,
        **more,
    )


def ids(batch: TokenBatch) -> set[int]:
    return set(batch.ids.flatten().tolist())


# -- batches ------------------------------------------------------------------------------------------


def test_first_takes_whole_windows_and_at_least_one() -> None:
    batch = TokenBatch(torch.arange(40).reshape(5, 8), "toy")
    assert batch.first(None) is batch
    assert batch.first(1_000) is batch
    assert batch.first(23).ids.shape == (2, 8)
    assert batch.first(1).ids.tolist() == [list(range(8))]
    assert (len(batch), batch.n_tokens, batch.seqlen) == (5, 40, 8)


def test_the_digest_is_of_the_ids_alone() -> None:
    a, b = (TokenBatch(torch.arange(8).reshape(2, 4), name) for name in ("a", "b"))
    assert a.digest == b.digest
    assert a.digest != TokenBatch(torch.arange(1, 9).reshape(2, 4), "a").digest
    assert a.digest == hashlib.sha256(struct.pack("<8q", *range(8))).hexdigest()


# -- draws --------------------------------------------------------------------------------------------


def test_one_file_gives_consecutive_disjoint_stretches(text: Path) -> None:
    draws = draw(Letters(), spec(text))
    stream = torch.cat([b.ids.flatten() for b in (draws.calibration, draws.search, draws.evaluation)])
    assert stream.tolist() == [ord(c) for c in numbered(112)]
    assert (len(draws.calibration), len(draws.search), len(draws.evaluation)) == (8, 4, 2)
    assert draws.source == str(text)


@pytest.mark.parametrize("shuffle", [False, True])
def test_recovery_has_windows_of_its_own_and_moves_no_other(text: Path, shuffle: bool) -> None:
    asked = spec(text, recovery_tokens=24, shuffle=shuffle)
    assert draw(Letters(), asked).recovery is None
    draws, without = draw(Letters(), asked, recovery=True), draw(Letters(), asked)
    assert draws.recovery is not None
    assert draws.recovery.ids.shape == (3, 8)
    parts = (draws.calibration, draws.search, draws.recovery, draws.evaluation)
    assert len(set.union(*map(ids, parts))) == 64 + 32 + 24 + 16
    if not shuffle:  # else the pool that is drawn from has grown
        same = ("calibration", "search", "evaluation")
        assert all(getattr(draws, part).digest == getattr(without, part).digest for part in same)
    assert draws.spec.digests is not None
    assert draws.spec.digests["recovery"] == draws.recovery.digest
    assert draw(Letters(), draws.spec, recovery=True).spec == draws.spec


def test_recovery_may_have_a_text_of_its_own(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "hangul.txt"
    other.write_text("".join(chr(0xAC00 + i) for i in range(200)), encoding="utf-8")
    draws = draw(Letters(), spec(text, recovery_tokens=48, recovery_dataset=str(other)), recovery=True)
    assert draws.recovery is not None
    assert draws.recovery.source == "hangul"
    assert draw(Letters(), draws.spec, recovery=True).spec == draws.spec
    with pytest.raises(WrongInput, match="recovery 400"):
        draw(Letters(), spec(text, recovery_tokens=400, recovery_dataset=str(other)), recovery=True)


def test_recovery_from_the_text_of_the_evaluation_is_refused(text: Path, tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("".join(chr(0xAC00 + i) for i in range(64)), encoding="utf-8")
    said = spec(text, evaluation_dataset=str(tmp_path / "one.txt"), recovery_dataset=str(tmp_path / "two.txt"))
    with pytest.raises(WrongInput, match=r"evaluation and recovery read the same text under two names"):
        draw(Letters(), said.model_copy(update={"recovery_tokens": 64}), recovery=True)


def test_evaluation_from_another_file(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("abcdefgh" * 4)
    draws = draw(Letters(), spec(text, evaluation_dataset=str(other)))
    assert draws.evaluation.source == "other"
    assert draws.evaluation.ids.tolist() == [[ord(c) for c in "abcdefgh"]] * 2


def test_shuffled_windows_hang_on_the_seed_and_stay_disjoint(text: Path) -> None:
    first, again, other = (draw(Letters(), spec(text, shuffle=True), seed=seed) for seed in (1, 1, 2))
    assert first.calibration.digest == again.calibration.digest != other.calibration.digest
    assert first.evaluation.digest == other.evaluation.digest
    pool = numbered(8 * 14 * POOL)  # whatever is drawn, evaluation is its end
    assert first.evaluation.ids.flatten().tolist() == [ord(c) for c in pool[-16:]]
    parts = [ids(b) for b in (first.calibration, first.search, first.evaluation)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 112


def test_the_resolved_spec_draws_the_same_tokens(text: Path) -> None:
    draws = draw(Letters(), DataSpec(dataset=str(text)), max_seqlen=16)
    assert draws.spec.seqlen == 16
    assert draws.spec.digests == {part: getattr(draws, part).digest for part in ("calibration", "search", "evaluation")}
    again = draw(Letters(), draws.spec)
    assert again.spec == draws.spec
    assert again.calibration.digest == draws.calibration.digest


def test_other_text_than_the_recipe_was_made_with_is_refused(text: Path) -> None:
    resolved = draw(Letters(), spec(text)).spec
    text.write_text(numbered(20_001)[1:], encoding="utf-8")
    with pytest.raises(WrongInput, match=r"other calibration tokens.*remove data\.digests"):
        draw(Letters(), resolved)


def test_a_second_data_set_is_as_long_as_calibration_and_recorded(text: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.txt"
    second.write_text(numbered(100)[::-1], encoding="utf-8")
    draws = draw(Letters(), spec(text, contrast_dataset=str(second)))
    alone = draw(Letters(), spec(text))
    assert alone.contrast is None
    assert draws.contrast is not None
    assert (draws.contrast.n_tokens, draws.contrast.source) == (64, "second")
    assert draws.contrast.ids.flatten().tolist() == [ord(letter) for letter in numbered(100)[::-1][:64]]
    assert draws.calibration.digest == alone.calibration.digest
    assert draws.spec.digests == {**(alone.spec.digests or {}), "contrast": draws.contrast.digest}
    assert draw(Letters(), draws.spec).spec == draws.spec

    second.write_text(numbered(100), encoding="utf-8")
    with pytest.raises(WrongInput, match=r"other contrast tokens than .*second\.txt"):
        draw(Letters(), draws.spec)
    second.write_text(numbered(40), encoding="utf-8")
    with pytest.raises(WrongInput, match=r"too little text: .*second\.txt has 40 tokens.*contrast 64"):
        draw(Letters(), spec(text, contrast_dataset=str(second)))


def test_defaults_shrink_to_the_text_and_say_so(text: Path) -> None:
    heard = Heard()
    draws = draw(Letters(), DataSpec(dataset=str(text)), heard, max_seqlen=16)
    sizes = [b.n_tokens for b in (draws.calibration, draws.search, draws.evaluation)]
    assert sizes[0] == sizes[1] == pytest.approx(2 * sizes[2], rel=0.3)
    assert min(sizes) >= LEAST
    assert 19_900 < sum(sizes) <= 20_000
    assert any("20,000 tokens" in line for line in heard.lines)


def test_what_was_asked_for_is_not_shrunk(text: Path) -> None:
    draws = draw(Letters(), DataSpec(dataset=str(text), calibration_tokens=12_000), max_seqlen=16)
    assert draws.calibration.n_tokens == 12_000


def test_slices_make_the_same_stream(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    whole = draw(Letters(), spec(text)).calibration.digest
    monkeypatch.setattr(sources, "SLICE", 7)
    assert draw(Letters(), spec(text)).calibration.digest == whole
    assert list(sources.slices(["abcde", "", "fghijklmnopqrstu", "v"])) == ["abcdefg", "hijklmn", "opqrstu", "v"]


def test_evaluation_is_the_first_tokens(text: Path) -> None:
    batch = draw_evaluation(Letters(), DataSpec(dataset=str(text), evaluation_tokens=24, seqlen=8))
    assert batch.ids.flatten().tolist() == [ord(c) for c in numbered(24)]


# -- what windows begin with --------------------------------------------------------------------------


def begun(draws: Draws) -> dict[str, bool]:
    """Part -> whether all its windows begin with BOS, and no window has it anywhere else."""
    found = dict[str, bool]()
    for part in ("calibration", "search", "recovery", "contrast", "evaluation"):
        there = getattr(draws, part).ids == 1
        assert not there[:, 1:].any()
        assert there[:, 0].all() or not there.any()
        found[part] = bool(there.any())
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_windows_begin_as_the_tokenizer_begins_a_text_but_those_that_judge(
    text: Path, tmp_path: Path, shuffle: bool
) -> None:
    second = tmp_path / "second.txt"
    second.write_text("".join(chr(0xAC00 + i) for i in range(100)), encoding="utf-8")
    data = spec(text, recovery_tokens=16, contrast_dataset=str(second), shuffle=shuffle)
    without, served = (draw(made(), data, recovery=True) for made in (Letters, Beginning))
    assert not any(begun(without).values())
    assert begun(served) == {part: part != "evaluation" for part in begun(served)}
    for part in begun(served):  # nothing else has moved
        assert torch.equal(getattr(served, part).ids[:, 1:], getattr(without, part).ids[:, 1:])
    assert served.evaluation.digest == without.evaluation.digest
    assert (without.spec.window_start, served.spec.window_start) == ("none", "bos")
    assert draw(Beginning(), served.spec, recovery=True).spec == served.spec
    assert draw(Letters(), without.spec, recovery=True).spec == without.spec


def test_the_start_of_windows_is_a_choice(text: Path) -> None:
    cut = draw(Letters(), spec(text)).calibration
    assert draw(Beginning(), spec(text, window_start="none")).calibration.digest == cut.digest
    silent = Letters()  # it has BOS and does not put it anywhere
    silent.bos_token_id = 7  # type: ignore[attr-defined]
    assert draw(silent, spec(text)).calibration.digest == cut.digest
    assert (draw(silent, spec(text, window_start="bos")).calibration.ids[:, 0] == 7).all()
    with pytest.raises(WrongInput, match="window_start is bos, and the tokenizer has no BOS token; give auto or none"):
        draw(Letters(), spec(text, window_start="bos"))
    with pytest.raises(WrongInput, match="windows of 2 tokens that begin with BOS hold no text"):
        draw(Beginning(), spec(text, seqlen=2))


def test_a_start_hides_no_text_that_two_parts_share(text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(WrongInput, match="evaluation and calibration read the same text under two names"):
        draw(Beginning(), spec(text, evaluation_dataset=str(copy)))
    long = TokenBatch(torch.arange(1_000).reshape(2, 500), "long")
    assert overlap(long.begun_with([1]), TokenBatch(torch.arange(3, 1_203).reshape(3, 400), "other")) == 0.5


def test_evaluation_alone_is_cut_as_ever(text: Path) -> None:
    asked = DataSpec(dataset=str(text), evaluation_tokens=24, seqlen=8)
    assert draw_evaluation(Beginning(), asked).digest == draw_evaluation(Letters(), asked).digest


# -- sources ------------------------------------------------------------------------------------------


def test_python_docs_evaluates_on_its_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": "a" * 1_000, "test": "b" * 1_000}
    monkeypatch.setattr("prunekit.data.python_docs.text", splits.__getitem__)
    draws = draw(Letters(), spec("python-docs"))
    assert ids(draws.calibration) | ids(draws.search) == {ord("a")}
    assert ids(draws.evaluation) == {ord("b")}
    assert draws.evaluation.source == "python-docs-test"
    assert draws.source == "python-docs, split 'train'"


def test_evaluation_on_the_same_split_is_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.data.python_docs.text", lambda _: numbered(200))
    draws = draw(Letters(), spec("python-docs", evaluation_split="train"))
    assert not ids(draws.evaluation) & (ids(draws.calibration) | ids(draws.search))


def test_auto_without_a_hub_warns_and_takes_python_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.data.python_docs.text", lambda _: numbered(200))
    heard = Heard()
    draws = draw(Letters(), spec("auto"), heard)
    assert draws.spec.dataset == "python-docs"
    assert heard.lines[0].startswith("warning: the hub is switched off (HF_HUB_OFFLINE)")


def test_jsonl_rows_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": body}) for body in ("abc", "defg", "hij" * 50)))
    draws = draw(Letters(), spec(path, field="body"))
    assert "".join(map(chr, draws.calibration.ids.flatten().tolist())).startswith("abc\n\ndefg\n\nhij")
    assert draws.source.endswith("field 'body'")


def test_parquet_rows_are_joined_by_blank_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["abc", "defg" * 50]}), path)
    batch = draw(Letters(), spec(path)).calibration
    assert "".join(map(chr, batch.ids.flatten().tolist())).startswith("abc\n\ndefgdefg")
    with pytest.raises(WrongInput, match="no field 'body'; there are text"):
        draw(Letters(), spec(path, field="body"))


def test_known_hub_sets_name_config_split_and_field(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, config: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((path, config, split, streaming))
        return [{"text": numbered(300)}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    draws = draw(Letters(), spec("wikitext2"))
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
    ]
    assert draws.evaluation.source == "wikitext2-test"


def test_general_is_several_data_sets_of_the_hub_with_their_own_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    starts = {"wikitext": 0x7E00}
    first = {"fineweb-edu": 0x4E00, "smol-smoltalk": 0xAC00, "codeparrot-clean-valid": 0x5E00, "finemath": 0x6E00}

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        name = path.split("/")[1]
        start = (first | starts)[name] + (1_000 if split == "test" else 0)
        content = "".join(chr(start + i) for i in range(900))
        talk = [{"role": "user", "content": content}]
        row = {"smol-smoltalk": {"messages": talk}, "codeparrot-clean-valid": {"content": content}}
        return [row.get(name, {"text": content})]

    def splits(path: str, config: str | None) -> list[str]:
        return ["train", "test"] if path.endswith("smol-smoltalk") else ["train"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", splits)
    draws = draw(Talkative(), spec("general", 64, 32, 32))
    assert {name.split("--")[-1]: len(part) for name, part in draws.calibration.parts.items()} == {
        "fineweb-edu-train": 2, "smol-smoltalk-train": 2, "codeparrot-clean-valid-train": 2, "finemath-train": 2
    }  # fmt: skip
    assert [one.dataset.split("/")[-1] for one in draws.spec.texts("dataset")] == list(first)
    assert draw(Talkative(), draws.spec).spec == draws.spec  # the recipe of a result names every one
    halves = {**spec("x", 64, 64, 64).model_dump(), "dataset": ["general", "wikitext2"]}
    shares = [len(part) for part in draw(Talkative(), DataSpec.model_validate(halves)).calibration.parts.values()]
    assert sorted(shares) == [1, 1, 1, 1, 4]  # it has the weight of one
    with pytest.raises(WrongInput, match="'general' is several, which have their own config, split and field"):
        draw(Talkative(), spec("general", split="train"))
    with pytest.raises(WrongInput, match="'general' is several data sets; here one is read"):
        draw(Talkative(), spec("wikitext2", contrast_dataset="general"))


@pytest.mark.parametrize(
    ("data", "limits", "sentence"),
    [
        ({"dataset": "wikitex2"}, {}, "did you mean 'wikitext2'"),
        ({"dataset": "missing.txt"}, {}, "no file 'missing.txt'"),
        ({"dataset": "./missing"}, {}, "no file './missing'"),
        ({"dataset": "some/where/else"}, {}, "no file 'some/where/else'"),
        ({"dataset": "."}, {}, "is a folder"),
        ({"dataset": "EMPTY"}, {}, "0 tokens"),
        (
            {"dataset": "python-docs", "split": "dev"},
            {},
            "no split 'dev' of python-docs; there are train, validation, t",
        ),
        ({"split": "train"}, {}, "a file has no split"),
        ({"seqlen": 8}, {"max_seqlen": 4}, "seqlen 8 is longer than the model's 4 positions"),
        ({"seqlen": 8}, {"vocab_size": 100}, "the model knows 100"),
        ({"calibration_tokens": 64, "calibration_draw": 400}, {}, r"not enough for data\.calibration_draw 400"),
        ({"calibration_tokens": 19_000}, {"max_seqlen": 16}, r"too little text: .*20,000 tokens.* are needed"),
        ({"calibration_tokens": 15_000, "seqlen": 1000}, {}, r"21,000 are needed \(.*search 3,000, evaluation 3,000"),
        ({"search_tokens": 30_000}, {"max_seqlen": 16}, r"too little text: .*20,000 tokens.* are needed"),
        ({"dataset": "x" * 300}, {}, "no data set 'xxx"),
        ({"dataset": "/tmp/" + "x" * 300}, {}, "no file '/tmp/xxx"),
        ({"dataset": "~nobody-of-this-name/x.txt"}, {}, "no file '~nobody"),
        ({"dataset": "rows.jsonl.gz"}, {}, "no file 'rows.jsonl.gz'"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(
    text: Path, tmp_path: Path, data: dict[str, Any], limits: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "EMPTY").touch()
    given = {"EMPTY": str(tmp_path / "EMPTY")}.get(data.get("dataset", ""), data.get("dataset", str(text)))
    with pytest.raises(WrongInput, match=sentence):
        draw(Letters(), DataSpec(**{**data, "dataset": given}), **limits)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\nno\n', "line 2: not one JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', "no text in field 'text'; there are body"),
        ("a.jsonl", b"[1]\n", "no text in field 'text'"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.jsonl", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.parquet", b"nothing of the kind", "is not a parquet file"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WrongInput, match=sentence):
        draw(Letters(), spec(tmp_path / name))


@pytest.mark.parametrize("length", [6_500, 12_345, 19_999])
def test_a_text_too_short_for_the_defaults_is_drawn_the_same_again(tmp_path: Path, length: int) -> None:
    path = tmp_path / "short.txt"
    path.write_text(numbered(length), encoding="utf-8")
    first = draw(Letters(), DataSpec(dataset=str(path), seqlen=8))
    again = draw(Letters(), first.spec)
    for part in ("calibration", "search", "evaluation"):
        assert torch.equal(getattr(first, part).ids, getattr(again, part).ids)


def test_one_file_under_two_names_is_still_cut_into_disjoint_parts(text: Path) -> None:
    drawn = draw(Letters(), spec(text, evaluation_dataset=str(text.parent / ".." / text.parent.name / text.name)))
    assert not ids(drawn.calibration) & ids(drawn.evaluation)


# -- several data sets --------------------------------------------------------------------------------


@pytest.fixture
def mixed(text: Path, tmp_path: Path) -> list[Any]:
    """Numbered characters and, with twice the weight, letters that never repeat either."""
    other = tmp_path / "hangul.txt"
    other.write_text("".join(chr(0xAC00 + i) for i in range(11_000)), encoding="utf-8")
    return [str(text), {"dataset": str(other), "weight": 2}]


def several(mixed: list[Any], **more: Any) -> DataSpec:
    return DataSpec.model_validate({**spec("x", 96, 48, 24).model_dump(), "dataset": mixed, **more})


def test_every_prefix_holds_the_sources_in_their_shares(mixed: list[Any]) -> None:
    draws = draw(Letters(), several(mixed))
    batch = draws.calibration
    assert batch.source == "numbered+hangul"
    assert {name: len(part) for name, part in batch.parts.items()} == {"numbered": 4, "hangul": 8}
    for windows in range(1, len(batch) + 1):
        counts = {name: len(part) for name, part in batch.first(8 * windows).parts.items()}
        assert abs(counts.get("numbered", 0) - windows / 3) < 1
    assert list(batch.origins[:3]) == list(batch.origins[3:6])
    assert draws.source.endswith("hangul.txt")


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 60))
def test_turns_are_fair_after_every_turn(weights: list[int], n: int) -> None:
    streams = [sources.Source(f"{i}", None, None, "text") for i in range(len(weights))]
    shares = {source: Fraction(w, sum(weights)) for source, w in zip(streams, weights, strict=True)}
    order = in_shares(shares, n + sum(weights))  # enough for the smallest
    for turn in range(1, len(order) + 1):
        assert all(abs(order[:turn].count(source) - turn * share) < 1.5 for source, share in shares.items())


def test_parts_of_several_data_sets_share_no_window(mixed: list[Any]) -> None:
    for shuffle in (False, True):
        draws = draw(Letters(), several(mixed, shuffle=shuffle))
        parts = [ids(b) for b in (draws.calibration, draws.search, draws.evaluation)]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 168
        assert {b.source for b in (draws.calibration, draws.search, draws.evaluation)} == {"numbered+hangul"}


def test_each_data_set_has_its_digest_and_the_resolved_spec_draws_the_same(mixed: list[Any]) -> None:
    draws = draw(Letters(), several(mixed))
    digests = draws.spec.digests or {}
    assert digests.keys() == {
        f"{part}{label}" for part in ("calibration", "search", "evaluation") for label in ("", "/numbered", "/hangul")
    }
    again = draw(Letters(), draws.spec)
    assert again.spec == draws.spec
    Path(mixed[1]["dataset"]).write_text("x" * 11_000)
    with pytest.raises(WrongInput, match="other calibration tokens"):
        draw(Letters(), draws.spec)


def test_evaluation_on_one_of_several_takes_another_stretch_of_it(mixed: list[Any]) -> None:
    draws = draw(Letters(), several(mixed, evaluation_dataset=mixed[0]))
    assert draws.evaluation.source == "numbered"
    assert not ids(draws.evaluation) & (ids(draws.calibration) | ids(draws.search))
    assert draw(Letters(), draws.spec).evaluation.digest == draws.evaluation.digest


def test_search_may_have_a_text_of_its_own(text: Path, mixed: list[Any]) -> None:
    draws = draw(Letters(), spec(text, search_dataset=mixed[1]["dataset"]))
    assert (draws.calibration.source, draws.search.source) == ("numbered", "hangul")
    assert draw(Letters(), draws.spec).spec == draws.spec
    same = draw(Letters(), spec(text, search_dataset=str(text)))
    assert same.search.digest == draw(Letters(), spec(text)).search.digest


def test_the_scarcest_data_set_ends_the_mixture(mixed: list[Any], tmp_path: Path) -> None:
    Path(mixed[1]["dataset"]).write_text(numbered(9_000))
    draws = draw(Letters(), DataSpec.model_validate({"dataset": mixed, "seqlen": 8}))
    for batch in (draws.calibration, draws.search, draws.evaluation):
        assert abs(len(batch.parts["hangul"]) - 2 * len(batch.parts["numbered"])) <= 2
    assert draw(Letters(), draws.spec).spec == draws.spec


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        (["A", "A"], "is given twice"),
        (["A", {"dataset": "B", "weight": 1000}], "12 windows leave none for"),
        (["A", "gone.txt"], "no file 'gone.txt'"),
    ],
)
def test_mixtures_that_cannot_be_are_one_sentence(mixed: list[Any], dataset: list[Any], sentence: str) -> None:
    names = {"A": mixed[0], "B": mixed[1]["dataset"]}
    real = [names.get(d, d) if isinstance(d, str) else {**d, "dataset": names[d["dataset"]]} for d in dataset]
    with pytest.raises(WrongInput, match=sentence):
        draw(Letters(), several(real))
    with pytest.raises(WrongInput, match=r"data\.split are of one data set"):
        draw(Letters(), several(mixed, split="train"))


@pytest.mark.parametrize("shuffle", [False, True])
def test_another_draw_calibrates_on_other_windows_and_leaves_the_rest(text: Path, shuffle: bool) -> None:
    first, *others = (
        draw(Letters(), spec(text, recovery_tokens=16, shuffle=shuffle, calibration_draw=i), recovery=True)
        for i in range(4)
    )
    seen = ids(first.calibration)
    for other in others:
        for part in ("search", "recovery", "evaluation"):
            assert getattr(other, part).digest == getattr(first, part).digest
            assert not ids(other.calibration) & (seen | ids(getattr(first, part)))
        assert len(other.calibration) == len(first.calibration)
        seen |= ids(other.calibration)


def test_overlap_is_a_common_window() -> None:
    one, two = TokenBatch(torch.arange(80).reshape(10, 8), "one"), TokenBatch(torch.arange(72, 96).reshape(3, 8), "two")
    assert (overlap(one, two), overlap(two, one)) == (0.1, pytest.approx(1 / 3))
    assert not overlap(one.first(72), two)


@pytest.mark.parametrize("part", ["evaluation", "search", "contrast"])
@pytest.mark.parametrize("name", ["copy.txt", "copy.jsonl", "copy.txt.gz"])
def test_the_same_text_under_two_names_is_refused(text: Path, tmp_path: Path, part: str, name: str) -> None:
    content, copy = text.read_text(encoding="utf-8"), tmp_path / name
    as_row = json.dumps({"text": content}) if name.endswith("jsonl") else content
    copy.write_bytes(gzip.compress(as_row.encode()) if name.endswith("gz") else as_row.encode())
    for amounts in ((64, 64, 64), (64, 32, 16)):
        with pytest.raises(WrongInput, match=rf"{part} and calibration .* two names, .*{name}.*data\.{part}_dataset"):
            draw(Letters(), spec(text, *amounts, seqlen=8, **{f"{part}_dataset": str(copy)}))


def test_evaluation_on_the_text_of_the_search_is_refused(text: Path, tmp_path: Path) -> None:
    for name in ("search.txt", "copy.txt"):
        (tmp_path / name).write_text(numbered(30_000)[20_000:], encoding="utf-8")
    with pytest.raises(WrongInput, match="evaluation and search read the same text under two names"):
        draw(
            Letters(),
            spec(text, search_dataset=str(tmp_path / "search.txt"), evaluation_dataset=str(tmp_path / "copy.txt")),
        )


def test_a_common_part_is_warned_of_with_its_share(text: Path, tmp_path: Path) -> None:
    other, heard = tmp_path / "other.txt", Heard()
    other.write_text(numbered(8) + numbered(20_100)[20_000:], encoding="utf-8")
    draw(Letters(), spec(text, evaluation=32, evaluation_dataset=str(other)), heard)
    assert [line for line in heard.lines if "25.0% of the evaluation windows are calibration windows too" in line]
    heard.lines.clear()
    draw(Letters(), spec(text), heard)
    assert not heard.lines


@pytest.mark.parametrize(
    ("shifted", "share"),
    [("a line in front.\n" + numbered(20_000), "62.5%"), (numbered(20_000)[3:], "100.0%")],
    ids=["line in front", "later"],
)
def test_the_same_text_cut_at_other_places_is_warned_of(text: Path, tmp_path: Path, shifted: str, share: str) -> None:
    (tmp_path / "shifted.txt").write_text(shifted, encoding="utf-8")
    (tmp_path / "again.txt").write_text(shifted, encoding="utf-8")
    data, heard = spec(text, 128, 16, 64, evaluation_dataset=str(tmp_path / "shifted.txt")), Heard()
    if share == "100.0%":
        with pytest.raises(WrongInput, match="evaluation and calibration read the same text under two names"):
            draw(Letters(), data, heard)
        return
    draw(Letters(), data, heard)
    assert f"warning: {share} of the evaluation windows are calibration windows too" in heard.lines[0]


def test_evaluation_on_the_text_of_the_contrast_is_refused(text: Path, tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(numbered(20_000)[::-1], encoding="utf-8")
    data = spec(text, contrast_dataset=str(tmp_path / "one.txt"), evaluation_dataset=str(tmp_path / "two.txt"))
    with pytest.raises(WrongInput, match="evaluation and contrast read the same text under two names"):
        draw(Letters(), data)


def test_a_text_that_repeats_itself_is_warned_of(tmp_path: Path) -> None:
    path, heard = tmp_path / "again.txt", Heard()
    path.write_text("word " * 1_000)
    draw(Letters(), spec(path, 80, 80, 80, seqlen=40), heard)
    assert sum("100.0% of the" in line for line in heard.lines) == 3


# -- rows ---------------------------------------------------------------------------------------------


def drawn_text(path: Path, heard: Progress | None = None, field: Any = None, tokenizer: Any = None) -> str:
    data = spec(path, 16, 16, 16, field=field)
    return "".join(map(chr, draw(tokenizer or Letters(), data, heard).calibration.ids.flatten().tolist()))


def lines_of(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_empty_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "ab"}, {"text": None}, {"text": ""}, {"text": "cd" * 100}]
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        path, heard = tmp_path / name, Heard()
        if name.endswith("parquet"):
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text(json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows)))
        assert drawn_text(path, heard).startswith("ab\n\ncdcd")
        assert f"note: 2 of 4 rows of {path} are empty or null; they are skipped" in heard.lines


def test_a_null_conversation_is_skipped_and_counted(tmp_path: Path) -> None:
    rows = [{"messages": None}, {"messages": [{"role": "user", "content": "ab" * 50}]}]
    heard = Heard()
    assert drawn_text(lines_of(tmp_path / "rows.jsonl", rows), heard).startswith("abab")
    assert any("1 of 2 rows of" in line for line in heard.lines)


def test_a_field_of_a_table_that_is_read_as_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,text\n" + "1,abc\n" * 100)
    assert drawn_text(tmp_path / "rows.csv").startswith("id,text\n1,abc")
    with pytest.raises(WrongInput, match=r"rows\.csv is read as one text, which has no field 'text'; save its rows"):
        drawn_text(tmp_path / "rows.csv", field="text")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("ab" * 100)
    with pytest.raises(WrongInput, match=r"caf\\udce9\.txt' is not UTF-8; rename it"):
        drawn_text(path)


def test_empty_lines_of_the_hub_stay_as_perplexities_are_measured_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "ab"}, {"text": ""}, {"text": None}, {"text": numbered(300)}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    ids = draw(Letters(), spec("wikitext2")).calibration.ids.flatten().tolist()
    assert "".join(map(chr, ids)).startswith("ab\n\n\n\n" + numbered(3))


def test_one_bad_row_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a"}] * 17 + [{"id": 3}] + [{"text": "a" * 50}] * 482
    with pytest.raises(WrongInput, match=r"rows\.jsonl, line 18: no text in field 'text'; there are id"):
        drawn_text(lines_of(tmp_path / "rows.jsonl", rows))


def test_conversations_are_joined_where_no_template_is_known(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    path, heard = lines_of(tmp_path / "rows.jsonl", [talk] * 9), Heard()
    assert drawn_text(path, heard) == "Hi\n\nHello\n\nHi\n\nH"
    assert f"note: the tokenizer has no chat template; messages of {path} are joined by blank lines" in heard.lines


class Talkative(Letters):
    """It knows how its model was shown conversations."""

    chat_template = "a template"

    def get_chat_template(self) -> str:
        return self.chat_template

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return [ord(letter) for m in messages for letter in f"[{m['role'][0]} {m['content']}]"]


def test_conversations_and_text_follow_each_other(tmp_path: Path) -> None:
    shared = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    rows = [{"text": "a"}, {"text": "b"}, shared, shared, {"text": "c" * 200}]
    data = spec(lines_of(tmp_path / "rows.jsonl", rows), 40, 16, 16)
    stream = "".join(map(chr, draw(Talkative(), data).calibration.ids.flatten().tolist()))
    assert stream == "a\n\nb[u Hi][a Yo][u Hi][a Yo]cccccccccccc"


def test_text_and_conversations_of_two_files_are_windows_in_turns(text: Path, tmp_path: Path) -> None:
    talks = [{"messages": [{"role": "user", "content": "ab" * 9}, {"role": "assistant", "content": "cd"}]}] * 40
    chats = lines_of(tmp_path / "chats.jsonl", talks)
    data = DataSpec.model_validate(
        {**spec("x", 64, 32, 16).model_dump(), "dataset": [str(text), {"dataset": str(chats), "weight": 3}]}
    )
    draws = draw(Talkative(), data)
    parts = draws.calibration.parts
    assert {name: len(part) for name, part in parts.items()} == {"numbered": 2, "chats": 6}
    assert "".join(map(chr, parts["chats"].ids.flatten().tolist())).startswith("[u ababa")
    assert draw(Talkative(), draws.spec).spec == draws.spec


def test_a_field_that_is_asked_for_is_read_also_beside_a_prompt(text: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "pp", "answer": "aa", "completion": "cc", "text": "tt" * 9}] * 30
    path = lines_of(tmp_path / "rows.jsonl", rows)
    assert drawn_text(path).startswith("tttt")  # what calibrates is no question
    assert drawn_text(path, field="text").startswith("tttt")
    assert drawn_text(path, field=["prompt", "completion"]).startswith("pp\n\ncc\n\npp")
    assert draw(Letters(), spec(text, search_dataset=str(path))).search.answers is not None
    assert draw(Letters(), spec(text, search_dataset=[{"dataset": str(path), "field": "text"}])).search.answers is None


def test_a_recipe_that_names_the_field_of_texts_still_reads_its_questions(text: Path, quiz: Path) -> None:
    assert draw(Letters(), spec(text, search_dataset=str(quiz), seqlen=16, field="text")).search.answers is not None


def test_every_part_reads_the_field_it_asks_for_and_the_recipe_says_so(tmp_path: Path) -> None:
    rows = [{"a": chr(0x4E00 + i) * 10, "b": chr(0xAC00 + i) * 10} for i in range(100)]
    path = lines_of(tmp_path / "rows.jsonl", rows)
    data = spec(path, field="a", evaluation_dataset=[{"dataset": str(path), "field": "b"}])
    draws = draw(Letters(), data)
    assert (min(ids(draws.calibration) - {10}) >> 8, min(ids(draws.evaluation) - {10})) == (0x4E, 0xAC00)
    again = draw(Letters(), draws.spec)
    assert (again.spec, again.evaluation.digest) == (draws.spec, draws.evaluation.digest)


def test_a_named_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(numbered(112),), kwargs={"encoding": "utf-8"})
    writer.start()
    assert draw(Letters(), spec(pipe)).evaluation.ids.flatten().tolist() == [ord(c) for c in numbered(112)[96:]]
    writer.join()


# -- questions ----------------------------------------------------------------------------------------


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    path = tmp_path / "quiz.jsonl"
    rows = [
        {"prompt": "2+2 =", "choices": ["3", "4"], "answer": 1},
        {"prompt": "Say ", "choices": ["no", "yes", "nothing"], "answer": "yes"},
        {"prompt": "Once upon a", "answer": " time"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_questions_become_windows_with_marked_answers(text: Path, quiz: Path) -> None:
    batch = draw(Letters(), spec(text, search=80, search_dataset=str(quiz), seqlen=16)).search
    asked = batch.answers
    assert asked is not None
    assert asked.question.tolist() == [0, 0, 1, 1, 1]  # there is room for five windows
    words = ["".join(map(chr, row[:end].tolist())) for row, end in zip(batch.ids, asked.last, strict=True)]
    assert words == ["2+2 = 3", "2+2 = 4", "Say no", "Say yes", "Say nothing"]
    answers = [word[first:] for word, first in zip(words, asked.first.tolist(), strict=True)]
    assert answers == [" 3", " 4", " no", " yes", " nothing"]
    assert asked.right.tolist() == [False, True, False, True, False]
    assert (batch.ids[0, asked.last[0] :] == 0).all()


def test_prompts_begin_with_what_the_tokenizer_puts_in_front(text: Path, quiz: Path) -> None:
    data = spec(text, search=10_000, search_dataset=str(quiz), seqlen=20)
    bare, served = draw(Letters(), data).search, draw(Beginning(), data).search
    assert bare.answers is not None
    assert served.answers is not None
    assert (served.ids[:, 0] == 1).all()
    assert torch.equal(served.ids[:, 1:], bare.ids)
    assert torch.equal(served.answers.first, bare.answers.first + 1)
    assert torch.equal(served.answers.last, bare.answers.last + 1)
    short = draw(Beginning(), data.model_copy(update={"seqlen": 10})).search
    assert short.answers is not None
    assert (short.ids[4].tolist(), int(short.answers.first[4])) == ([1, *map(ord, "y nothing")], 2)


def test_a_long_prompt_loses_its_beginning(text: Path, quiz: Path) -> None:
    batch = draw(Letters(), spec(text, search=10_000, search_dataset=str(quiz), seqlen=9)).search
    assert batch.answers is not None
    assert (batch.ids[4].tolist(), int(batch.answers.first[4])) == ([ord(c) for c in "y nothing"], 1)
    assert len(batch) == 6


def test_questions_of_two_files_take_turns(text: Path, quiz: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": "c"}\n' * 4)
    data = spec(text, search=10_000, search_dataset=[str(quiz), str(other)], seqlen=16)
    batch = draw(Letters(), data).search
    assert batch.answers is not None
    assert [len(part) for part in batch.parts.values()] == [6, 6]
    part = batch.parts["other"]
    assert part.answers is not None
    assert part.answers.right.tolist() == [False, True] * 3
    assert draw(Letters(), draw(Letters(), data).spec).search.digest == batch.digest


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a", "choices": ["b"], "answer": 1}, "question 1: 'answer' is one of the choices or its number"),
        ({"prompt": "a", "choices": "bc", "answer": 0}, "'choices' is a list of texts, not 'bc'"),
        ({"prompt": " ", "choices": ["b"], "answer": 0}, "needs a text 'prompt'"),
        ({"prompt": "a", "choices": ["b" * 99], "answer": 0}, "has 100 tokens, windows have 8"),
    ],
)
def test_broken_questions_are_one_sentence(text: Path, tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    (tmp_path / "broken.jsonl").write_text(json.dumps(row))
    with pytest.raises(WrongInput, match=sentence):
        draw(Letters(), spec(text, search_dataset=str(tmp_path / "broken.jsonl")))


def test_questions_only_judge(text: Path, quiz: Path) -> None:
    with pytest.raises(WrongInput, match=r"holds questions, which only judge; give it as data\.search_dataset"):
        draw(Letters(), spec(quiz))
    with pytest.raises(WrongInput, match="running text and cannot be mixed with questions"):
        draw(Letters(), spec(text, search_dataset=[str(text), str(quiz)], seqlen=16))
