"""Text does not become a special token by spelling one, and other text is encoded as ever."""

import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, PythonBackend

from prunekit import WrongInput
from prunekit.data import python_docs
from prunekit.data.draws import draw, draw_evaluation
from prunekit.data.encoding import LONGEST_CHAT, Encoder
from prunekit.data.fields import Conversation
from prunekit.data.sources import source_of
from prunekit.data.spec import DataSpec
from prunekit.data.windows import read
from prunekit.demo.run import MODEL
from prunekit.system.progress import Progress

SPELLED = "one <|endoftext|> two"


class Slow(PythonBackend):
    """One token per character, in Python."""

    vocab_files_names: ClassVar = {}  # type: ignore[misc]

    def __init__(self, **more: Any) -> None:
        self.letters = {chr(i): i for i in range(128)}
        super().__init__(eos_token="<|endoftext|>", unk_token="<unk>", **more)
        self.add_tokens([AddedToken("tion", special=False)])  # type: ignore[list-item]

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **more: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.letters.get(token, 129)  # that of <unk>

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def bundled() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def unigram() -> Any:
    """Its special tokens are pieces of its vocabulary, as sentencepiece writes them."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/|"]
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *letters], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("made", [bundled, Slow])
def test_ordinary_text_has_the_ids_it_always_had(made: Any) -> None:
    tokenizer, text = made(), python_docs.text("test")[:100_000]
    assert "<|endoftext|>" not in text
    assert Encoder(tokenizer)(text) == tokenizer.encode(text, add_special_tokens=False, verbose=False)


@pytest.mark.parametrize(("made", "special"), [(bundled, 0), (Slow, 128)])
def test_spelling_a_special_token_makes_none_unless_allowed(made: Any, special: int) -> None:
    tokenizer = made()
    assert tokenizer.eos_token_id == special
    assert special not in Encoder(tokenizer)(SPELLED)
    assert tokenizer.decode(Encoder(tokenizer)(SPELLED)).replace(" ", "") == SPELLED.replace(" ", "")
    assert Encoder(tokenizer, special_tokens=True)(SPELLED).count(special) == 1


def test_a_special_token_that_is_an_ordinary_piece_too_is_taken_apart() -> None:
    tokenizer = unigram()
    ids = Encoder(tokenizer)("a </s> b <s>")
    assert {1, 2}.isdisjoint(ids)
    assert tokenizer.convert_ids_to_tokens(ids) == list("▁a▁<▁/s>▁b▁<▁s>")
    assert Encoder(tokenizer)("a b") == tokenizer.encode("a b", add_special_tokens=False)


def test_every_reader_of_text_keeps_special_tokens_out(tmp_path: Path) -> None:
    text, quiz = tmp_path / "spelled.txt", tmp_path / "quiz.jsonl"
    text.write_text(" ".join(f"{i} <|endoftext|>" for i in range(3_000)))
    quiz.write_text(json.dumps({"prompt": "<|endoftext|> a", "choices": ["<|endoftext|>", "b"], "answer": 1}) + "\n")
    few: Any = dict.fromkeys((f"{part}_tokens" for part in ("calibration", "search", "evaluation")), 640)
    asked = DataSpec(dataset=str(text), search_dataset=str(quiz), seqlen=64, **few)
    tokenizer = bundled()
    for spell in (False, True):
        spec = asked.model_copy(update={"special_tokens": spell})
        draws = draw(tokenizer, spec)
        evaluated = draw_evaluation(tokenizer, spec)
        for batch in (draws.calibration, draws.evaluation, evaluated):
            assert bool((batch.ids == 0).any()) == spell
        asks = draws.search.answers
        assert asks is not None
        said = [ids[:end] for ids, end in zip(draws.search.ids, asks.last.tolist(), strict=True)]  # padding is 0 too
        assert any(bool((ids == 0).any()) for ids in said) == spell
    windows = read(tokenizer, source_of(str(text), None, None, "text"), 10, 64, Progress())
    assert not (windows == 0).any()


@pytest.mark.parametrize(
    ("template", "start"), [("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", []), ("</s> <s> $A", [2, 1])]
)
def test_what_a_tokenizer_puts_in_front_of_a_text_is_found(template: str, start: list[int]) -> None:
    tokenizer = unigram()
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    encoder = Encoder(tokenizer)
    assert encoder.start("auto") == start
    assert encoder.start("bos") == (start or [tokenizer.bos_token_id])
    assert encoder.start("none") == []
    assert encoder("a") == Encoder(unigram())("a")


@pytest.mark.parametrize("made", [bundled, Slow])
def test_a_tokenizer_that_puts_nothing_in_front_is_taken_at_its_word(made: Any) -> None:
    assert Encoder(made()).start("auto") == []


def test_lone_surrogates_are_replaced() -> None:
    tokenizer = bundled()
    assert Encoder(tokenizer)("a \ud83d b") == Encoder(tokenizer)("a \ufffd b")
    assert Encoder(tokenizer)("a \U0001f600 b") == tokenizer.encode("a \U0001f600 b", add_special_tokens=False)


def test_what_a_tokenizer_cannot_encode_is_one_sentence() -> None:
    raw = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(WrongInput, match=r"the tokenizer cannot encode 'b': Exception: WordLevel error: .*see to its"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=raw))("b")


# -- conversations ------------------------------------------------------------------------------------


TURNS = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}{% endfor %}"


def conversation(*contents: str) -> Conversation:
    roles = itertools.cycle(("user", "assistant"))
    return Conversation([{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], "rows, line 1")


def templated(template: str) -> Any:
    tokenizer = bundled()
    tokenizer.chat_template = template
    return tokenizer


def test_only_the_template_writes_special_tokens() -> None:
    tokenizer = templated(TURNS)
    ids = Encoder(tokenizer).chat(conversation(SPELLED, "half \ud83d an emoji"))
    assert isinstance(ids, list)
    assert ids.count(0) == 2
    assert tokenizer.decode(ids) == f"<|endoftext|>user: {SPELLED}<|endoftext|>assistant: half \ufffd an emoji"
    allowed = Encoder(tokenizer, special_tokens=True).chat(conversation(SPELLED, "yes"))
    assert list(allowed).count(0) == 3


def test_pieces_that_are_special_are_taken_apart_in_messages() -> None:
    tokenizer = unigram()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    ids = list(Encoder(tokenizer).chat(conversation("a </s> b")))
    assert (ids.count(1), ids.count(2)) == (1, 0)


def test_without_a_template_messages_are_joined_by_blank_lines() -> None:
    assert Encoder(bundled()).chat(conversation("one", "two")) == "one\n\ntwo"


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day() -> None:
    tokenizer = templated("{{ strftime_now('%d %b %Y %H:%M:%S') }}{{ messages[0].content }}")
    assert tokenizer.decode(Encoder(tokenizer).chat(conversation("!"))) == "26 Jul 2024!"


@pytest.mark.parametrize(
    ("template", "content", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", "a", r"line 1: the tokenizer's .* \(roles must alternate\)"),
        ("{% for %}", "a", "line 1: the tokenizer's chat template does not take it"),
        (TURNS, "a" * (LONGEST_CHAT + 1), "a conversation of 1,000,001 characters"),
    ],
)
def test_what_a_template_cannot_take_is_one_sentence(template: str, content: str, sentence: str) -> None:
    with pytest.raises(WrongInput, match=sentence):
        Encoder(templated(template)).chat(conversation(content))


def test_what_a_normalizer_makes_of_text_becomes_no_special_token() -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "<": 1, "s": 2, ">": 3, "?": 4}, unk_token="?"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?")
    more: Any = {"additional_special_tokens": [AddedToken("<s>", normalized=True, special=True)]}
    tokenizer.add_special_tokens(more)
    assert Encoder(tokenizer)("a<S>a") == [0, 1, 2, 3, 0]
    assert Encoder(tokenizer)("aXa") == [0, 4, 0]  # what is unknown stays so
    assert Encoder(tokenizer, special_tokens=True)("a<S>a") == [0, 5, 0]
