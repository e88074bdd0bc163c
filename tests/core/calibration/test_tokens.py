import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.calibration import tokens
from prunekit.calibration.tokens import TokenBatch, draw, draw_evaluation
from prunekit.errors import WrongInput
from prunekit.progress import Progress
from prunekit.recipe import DataSpec


class Letters:
    """One token per character, its code point; ids of consecutive windows of `numbered` never repeat."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        assert not add_special_tokens
        assert len(text) <= tokens.SLICE
        return [ord(letter) for letter in text]


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
    with pytest.raises(WrongInput, match="other contrast tokens than second"):
        draw(Letters(), draws.spec)
    second.write_text(numbered(40), encoding="utf-8")
    with pytest.raises(WrongInput, match=r"too little text: .*second\.txt has 40 tokens.*contrast 64"):
        draw(Letters(), spec(text, contrast_dataset=str(second)))


def test_defaults_shrink_to_the_text_and_say_so(text: Path) -> None:
    heard = Heard()
    draws = draw(Letters(), DataSpec(dataset=str(text)), heard, max_seqlen=16)
    sizes = [b.n_tokens for b in (draws.calibration, draws.search, draws.evaluation)]
    assert sizes[0] == sizes[1] == pytest.approx(2 * sizes[2], rel=0.3)
    assert min(sizes) >= tokens.LEAST
    assert 19_900 < sum(sizes) <= 20_000
    assert any("20,000 tokens" in line for line in heard.lines)


def test_what_was_asked_for_is_not_shrunk(text: Path) -> None:
    draws = draw(Letters(), DataSpec(dataset=str(text), calibration_tokens=12_000), max_seqlen=16)
    assert draws.calibration.n_tokens == 12_000


@pytest.mark.parametrize("asked", [{"calibration_tokens": 19_000}, {"search_tokens": 30_000}])
def test_too_little_text_says_what_there_is_and_what_is_needed(text: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(WrongInput, match=r"too little text: .*20,000 tokens.* are needed"):
        draw(Letters(), DataSpec(dataset=str(text), **asked), max_seqlen=16)


def test_an_empty_file_is_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(WrongInput, match="0 tokens"):
        draw(Letters(), DataSpec(dataset=str(tmp_path / "empty.txt")))


def test_windows_longer_than_the_model_are_refused(text: Path) -> None:
    with pytest.raises(WrongInput, match="seqlen 8 is longer than the model's 4 positions"):
        draw(Letters(), spec(text), max_seqlen=4)


def test_a_foreign_tokenizer_is_refused(text: Path) -> None:
    with pytest.raises(WrongInput, match="the model knows 100"):
        draw(Letters(), spec(text), vocab_size=100)


def test_slices_make_the_same_stream(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    whole = draw(Letters(), spec(text)).calibration.digest
    monkeypatch.setattr(tokens, "SLICE", 7)
    assert draw(Letters(), spec(text)).calibration.digest == whole
    assert list(tokens._slices(["abcde", "", "fghijklmnopqrstu", "v"])) == ["abcdefg", "hijklmn", "opqrstu", "v"]


def test_evaluation_is_the_first_tokens(text: Path) -> None:
    batch = draw_evaluation(Letters(), DataSpec(dataset=str(text), evaluation_tokens=24, seqlen=8))
    assert batch.ids.flatten().tolist() == [ord(c) for c in numbered(24)]


# -- sources ------------------------------------------------------------------------------------------


def test_python_docs_evaluates_on_its_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": "a" * 1_000, "test": "b" * 1_000}
    monkeypatch.setattr("prunekit.calibration.python_docs.text", splits.__getitem__)
    draws = draw(Letters(), spec("python-docs"))
    assert ids(draws.calibration) | ids(draws.search) == {ord("a")}
    assert ids(draws.evaluation) == {ord("b")}
    assert draws.evaluation.source == "python-docs-test"
    assert draws.source == "python-docs, split 'train'"


def test_evaluation_on_the_same_split_is_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.calibration.python_docs.text", lambda _: numbered(200))
    draws = draw(Letters(), spec("python-docs", evaluation_split="train"))
    assert not ids(draws.evaluation) & (ids(draws.calibration) | ids(draws.search))


def test_auto_without_a_hub_warns_and_takes_python_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.calibration.python_docs.text", lambda _: numbered(200))
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


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        ("wikitex2", "did you mean 'wikitext2'"),
        ("missing.txt", "no file 'missing.txt'"),
        ("./missing", "no file './missing'"),
        ("some/where/else", "no file 'some/where/else'"),
        (".", "is a folder"),
    ],
)
def test_no_such_data_is_one_sentence(dataset: str, sentence: str) -> None:
    with pytest.raises(WrongInput, match=sentence):
        draw(Letters(), DataSpec(dataset=dataset))


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


def test_no_such_split_is_one_sentence() -> None:
    with pytest.raises(WrongInput, match="no split 'dev' of python-docs; there are train, validation, test"):
        draw(Letters(), spec("python-docs", split="dev"))


def test_a_file_has_no_split(text: Path) -> None:
    with pytest.raises(WrongInput, match="a file has no split"):
        draw(Letters(), spec(text, split="train"))


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
