"""The tokenizer inside a file, and the proof that it is the same one.

llama.cpp has the rules that split a text into words built in, under names; a file only tells the name. It is found by
the rules of the tokenizer, and what the file then says is read back and must give the same ids on `PROBES`.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from prunekit.errors import NotVerified, WrongInput

NORMAL, UNKNOWN, CONTROL, OWN, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = "▁"  # a space, in vocabularies of SentencePiece
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TAIL_SLASH = TAIL.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = r"[^\r\n\p{L}\p{N}]?" + f"{UPPER}*{LOWER}+", r"[^\r\n\p{L}\p{N}]?" + f"{UPPER}+{LOWER}*"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
TEKKEN = "|".join(CASED) + r"|\p{N}" + TAIL_SLASH
GPT4O = "|".join(each + CONTRACTIONS + "?" for each in CASED) + r"|\p{N}{1,3}" + TAIL_SLASH

PRES: dict[str, tuple[tuple[str, ...], bool]] = {  # name in llama.cpp: how it splits, one after the other; whole words?
    "gpt-2": ((GPT2,), False),
    "smollm": ((DIGIT, GPT2), False),
    "llama-bpe": ((LLAMA3,), True),
    "dbrx": ((LLAMA3,), False),
    "qwen2": ((QWEN2,), False),
    "tekken": ((TEKKEN,), True),
    "gpt-4o": ((GPT4O,), False),
}
"""whole words: a word that is a token is that token, whatever its merges are"""

PROBES = (
    "Hello, world! It's 2,048 o'clock; we'll see.",
    "  two  spaces\tand a tab\n\nnew lines \n end  ",
    "def f(x):\r\n    return x**2 + 10_000  # π ≈ 3.14159",
    "ünïcödé ЖЖ 你好，世界 こんにちは 안녕 שלום مرحبا ไทย",
    "🙂👩‍👩‍👧 x\u00a0y \u2003z … “quotes” – —",
    "CamelCase snake_case SCREAMING I'M HE'LL don’t 1234567890 ٣٤٥",
    "a" * 20 + " " * 20 + "!" * 7 + "\n" * 3,
    "https://example.org/a/b?c=d&e=%20 <b>html</b> {json: [1, 2.5e-3]}",
)


@dataclass(frozen=True)
class Vocabulary:
    """What a file tells of its tokenizer."""

    model: str  # gpt2: byte-level BPE; llama: SentencePiece; no_vocab: there is none
    pre: str = ""
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special: Mapping[str, int] | None = None  # bos, eos, eot, unk, pad: ids
    add_bos: bool = False
    add_eos: bool = False
    add_space: bool = False
    template: str | None = None  # of chats


def make_vocabulary(tokenizer: Any, size: int, ends: Sequence[int] = (), pre: str = "") -> Vocabulary:
    """What a file is to tell of a tokenizer.

    Args:
        tokenizer: of transformers; None: the file tells nothing, and is run on ids.
        size: rows of the embeddings.
        ends: ids that end an answer, of the generation config.
        pre: the name of its rules in llama.cpp; "": found.

    Raises:
        WrongInput: the format or llama.cpp does not know such a tokenizer; says what there is.
    """
    if tokenizer is None:
        return Vocabulary("no_vocab")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise WrongInput(
            f"gguf needs a tokenizer with a tokenizer.json, not {type(tokenizer).__name__}; "
            "convert it with transformers, or leave gguf away"
        )
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE" or not model.get("merges"):
        what = "no merges" if model["type"] == "BPE" else f"the model {model['type']}"
        raise WrongInput(f"gguf carries tokenizers by byte pairs, and this one has {what}; leave gguf away")
    tokens, types = _tokens(rules, model["vocab"], size, model.get("unk_token"))
    merges = tuple(each if isinstance(each, str) else " ".join(each) for each in model["merges"])
    found = Vocabulary("gpt2", "", tokens, types, merges)
    pieces = bool(model.get("byte_fallback"))
    found = _sentencepiece(found, rules) if pieces else replace(found, pre=pre or _find_pre(rules))
    bos, eos = (getattr(tokenizer, f"{each}_token_id", None) for each in ("bos", "eos"))
    others = [each for each in ends if each != eos and each < size]
    special = {"bos": bos, "eos": eos if eos is not None or not others else others.pop(0)}
    special |= {"eot": others[0] if others else None}
    special |= {each: getattr(tokenizer, f"{each}_token_id", None) for each in ("unk", "pad")}
    plain, whole = (tokenizer.encode("a", add_special_tokens=add) for add in (False, True))
    template = getattr(tokenizer, "chat_template", None)
    found = replace(
        found,
        special={name: value for name, value in special.items() if value is not None},
        add_bos=bos is not None and whole[:1] == [bos] != plain[:1],
        add_eos=eos is not None and whole[-1:] == [eos] != plain[-1:],
        template=template if isinstance(template, str) else (template or {}).get("default"),
    )
    if apart := find_difference(found, lambda text: backend.encode(text, add_special_tokens=False).ids):
        text, theirs, ours = apart
        raise WrongInput(
            f"gguf cannot carry this tokenizer: by the rules of {found.pre or found.model} in llama.cpp {text!r} "
            f"becomes {ours[:8]}, not {theirs[:8]}; give exporters.gguf.pre another name, or leave gguf away"
        )
    return found


def find_difference(
    vocabulary: Vocabulary, encode: Callable[[str], list[int]]
) -> tuple[str, list[int], list[int]] | None:
    """The first probe that a file splits in another way than a tokenizer does, with both answers; None: there is none.

    Args:
        vocabulary: what the file tells.
        encode: the tokenizer, without what it puts around a text.
    """
    ours = make_tokenizer(vocabulary)
    for text in probes_of(vocabulary):
        if (found := ours(text)) != (wanted := encode(text)):
            return text, wanted, found
    return None


def probes_of(vocabulary: Vocabulary) -> list[str]:
    """Texts on which tokenizers are compared; some with added tokens."""
    added = [token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in (CONTROL, OWN)]
    if vocabulary.model == "llama":
        # llama.cpp, as SentencePiece, puts a space in front of a text and behind a special token; tokenizers not always
        return [text for text in PROBES if not text.startswith(" ")]
    return [*PROBES, *(f"before{token}after" for token in added[:16])]


def make_tokenizer(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """The tokenizer that llama.cpp makes of what a file tells.

    Raises:
        NotVerified: it makes none.
    """
    if vocabulary.model == "llama":
        return _by_scores(vocabulary)
    if vocabulary.pre not in PRES:
        raise NotVerified(f"the rules {vocabulary.pre!r} of a tokenizer are not known")
    splits, whole = PRES[vocabulary.pre]
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges]
    try:
        made = Tokenizer(models.BPE(ids, merges, ignore_merges=whole))  # type: ignore[arg-type]
    except Exception as error:  # whatever the library makes of damaged merges
        raise NotVerified(f"the merges of a tokenizer do not fit its tokens: {error}") from error
    stages: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*stages, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    added = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in (CONTROL, OWN)]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    return lambda text: made.encode(text, add_special_tokens=False).ids


def _tokens(
    rules: Mapping[str, Any], vocabulary: Mapping[str, int], size: int, unknown: str | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and their types by id; ids without a token are unused."""
    added = {each["id"]: each for each in rules.get("added_tokens", ())}
    texts = {index: token for token, index in vocabulary.items()} | {i: each["content"] for i, each in added.items()}
    if texts and max(texts) >= size:
        raise WrongInput(
            f"gguf cannot carry a tokenizer with id {max(texts):,}: the model has {size:,} embeddings; "
            "resize them before pruning"
        )
    tokens, types, taken = [], [], {*texts.values()}
    for index in range(size):
        if index not in texts:
            name = f"[UNUSED{index}]"
            while name in taken:
                name = f"[{name}]"
            tokens.append(name)
            types.append(UNUSED)
            continue
        text = texts[index]
        tokens.append(text)
        if index in added:
            types.append(CONTROL if added[index]["special"] else OWN)
        elif rules["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types.append(BYTE)
        else:
            types.append(UNKNOWN if text == unknown else NORMAL)
    if twice := len(tokens) - len({*tokens}):
        raise WrongInput(f"gguf cannot carry a tokenizer with {twice:,} tokens of the same text; leave gguf away")
    return tuple(tokens), tuple(types)


def _find_pre(rules: Mapping[str, Any]) -> str:
    """The name of the rules that split a text, in llama.cpp."""
    normalizer = rules.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp takes a text as it is
        raise WrongInput(
            f"gguf cannot carry a tokenizer that changes a text before it splits it ({normalizer['type']}); "
            "leave gguf away"
        )
    found = _splits(rules.get("pre_tokenizer") or {"type": "none"})
    wanted = found, bool(rules["model"].get("ignore_merges"))
    name = next((name for name, known in PRES.items() if known == wanted), None)
    if name is None:
        raise WrongInput(
            f"gguf does not know the rules by which this tokenizer splits a text; give exporters.gguf.pre their name "
            f"in llama.cpp if it is one of {', '.join(PRES)}, or leave gguf away"
        )
    return name


def _splits(stage: Mapping[str, Any]) -> tuple[str, ...]:
    """The patterns by which a text is split, one after the other."""
    kind = stage["type"]
    if kind == "Sequence":
        return tuple(split for each in stage["pretokenizers"] for split in _splits(each))
    if kind == "ByteLevel" and not stage.get("add_prefix_space"):
        return (GPT2,) if stage.get("use_regex", True) else ()
    if kind == "Digits" and stage.get("individual_digits"):
        return (DIGIT,)
    if kind == "Split" and "Regex" in stage["pattern"]:
        alone = stage["behavior"] == "Isolated" and not stage.get("invert")
        taken = stage["behavior"] == "Removed" and stage.get("invert")
        if alone or taken:
            return (stage["pattern"]["Regex"],)
    return (json.dumps(stage),)  # which no name stands for


def _sentencepiece(found: Vocabulary, rules: Mapping[str, Any]) -> Vocabulary:
    """By pieces with scores, as SentencePiece: of two neighbours those whose union scores highest become one.

    Merges are ordered, so the score of a token is minus the rank of the first merge that makes it.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(found.merges):
        left, right = merge.split(" ", 1)
        ranks.setdefault(left + right, rank)
    scores = tuple(-float(ranks[token]) if token in ranks else -1e6 for token in found.tokens)
    text = json.dumps([rules.get("normalizer"), rules.get("pre_tokenizer")])
    prefix = '"Prepend"' in text or re.search('"prepend_scheme": "(first|always)"', text) is not None
    return replace(found, model="llama", pre="default", merges=(), scores=scores, add_space=prefix)


def _by_scores(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}

    def encode(text: str) -> list[int]:
        letters = [*((" " if vocabulary.add_space else "") + text).replace(" ", SPACE)]
        after, before = [*range(1, len(letters) + 1)], [*range(-1, len(letters) - 1)]
        queue: list[tuple[float, int, str]] = []

        def offer(left: int) -> None:
            if left >= 0 and after[left] < len(letters):
                union = letters[left] + letters[after[left]]
                if union in ids:
                    heapq.heappush(queue, (-vocabulary.scores[ids[union]], left, union))

        for index in range(len(letters)):
            offer(index)
        while queue:
            _, left, union = heapq.heappop(queue)
            right = after[left] if letters[left] else len(letters)
            if right >= len(letters) or letters[left] + letters[right] != union:
                continue  # one of them has become part of another
            letters[left], letters[right], after[left] = union, "", after[right]
            if after[right] < len(letters):
                before[after[right]] = left
            offer(before[left])
            offer(left)
        found = []
        for piece in filter(None, letters):
            found += [ids[piece]] if piece in ids else [ids.get(f"<0x{byte:02X}>", 0) for byte in piece.encode()]
        return found

    return encode
