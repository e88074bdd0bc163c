"""YAML of anyone is plain values or one sentence, at once."""

import time

import pytest

from prunekit import WrongInput
from prunekit.recipe.plain import read_plain
from prunekit.recipe.presets import read_yaml
from prunekit.recipe.schema import Recipe

BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{this}: &{this} [{','.join([f'*{last}'] * 10)}]\n" for last, this in zip("abcdefgh", "bcdefghi", strict=True)
)  # 10⁹ elements


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (BOMB, "more than 65,536 values"),
        ("a: &a [*a]", "nested too deeply"),
        ("[" * 20_000, "nested too deeply"),
        ("a: " + "x" * 200_000, "has 200,003 letters"),
        ("damping: .inf", "damping is inf"),
        ("data: {seqlen: [1, .nan]}", r"data\.seqlen\[1\] is nan"),
        ("seed: " + "9" * 5000, "cannot be read: Exceeds the limit"),
        ("seed: 0x" + "f" * 5000, "seed is a number of 20,000 bits"),
        ("seed: 2020-13-45", "cannot be read: month must be in"),
        ("seed: 2020-01-01", "seed is a date, '2020-01-01'; quote it"),
        ("model: !!binary aGFsbG8=", "model is a bytes"),
        ("model: !!set {a}", "model is a set"),
        ("? [1]\n: 3", "line 1 is not YAML: found unhashable key"),
        ("x: !!python/object:os.system {}", "could not determine a constructor"),
        ("null: 3", "has the key None"),
        ("a: 1\n---\nb: 2", "found another document"),
        ("\0", "unacceptable character"),
    ],
)
def test_what_is_no_plain_value_is_refused(text, sentence):
    began = time.monotonic()
    with pytest.raises(WrongInput, match=f"^it.*{sentence}"):
        read_plain(text, "it")
    assert time.monotonic() - began < 10


def test_aliases_may_repeat_a_little():
    assert read_plain("a: &a [1, 2]\nb: [*a, *a]", "it") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert read_plain("", "it") is None


def test_a_recipe_in_another_encoding_names_the_file(tmp_path):
    (tmp_path / "r.yaml").write_bytes("model: caf\u00e9".encode("latin-1"))
    with pytest.raises(WrongInput, match=r"r\.yaml' is not UTF-8: .*; save it as UTF-8"):
        read_yaml(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("model: caf\u00e9", encoding="utf-8-sig")
    assert read_yaml(tmp_path / "r.yaml") == {"model": "caf\u00e9"}


@pytest.mark.parametrize("share", ["1e-400000000", "1e400000000", "0." + "3" * 100])
def test_a_target_with_an_endless_exponent_is_refused_at_once(share):
    with pytest.raises(WrongInput, match="target parameters is the share that stays"):
        Recipe.load("fast").with_overrides({"target": f"parameters={share}"})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_python_is_held_to_finite_numbers_too(value):
    with pytest.raises(WrongInput, match="damping"):
        Recipe.load("fast").with_overrides({"damping": value})
