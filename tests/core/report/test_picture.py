"""The picture of a result: one bar per block and part, as long as what is removed."""

import re
from xml.etree import ElementTree

import pytest

from prunekit.report.picture import BAR, draw, removed_shares

SVG = "{http://www.w3.org/2000/svg}"


def site(name, kind, kept, groups=10, parameters=100):
    return {
        "name": name, "block": int(re.search(r"\d+", name)[0]), "kind": kind,  # type: ignore[index]
        "groups": groups, "kept": kept, "parameters": kept * parameters,
    }  # fmt: skip


def groups(n):
    return [
        each
        for b in range(n)
        for each in (
            site(f"model.layers.{b}.self_attn.o_proj", "attention", b % 11),
            site(f"model.layers.{b}.mlp.down_proj", "mlp", 5),
        )
    ]


def test_shares_are_those_of_parameters_and_a_part_that_is_gone_counts_in_full():
    maps = [
        site("m.layers.0.self_attn.q_proj", "linear", 5, parameters=30),
        site("m.layers.0.self_attn.o_proj", "linear", 0),
        site("m.layers.1.self_attn.q_proj", "linear", 0),
        site("m.layers.1.self_attn.o_proj", "linear", 10, parameters=10),
        site("m.layers.1.fc1", "linear", 2),
        site("m.layers.2.mixer.in_proj", "linear", 10),
    ]
    assert removed_shares(maps) == {
        "attention": {0: pytest.approx(250 / 400), 1: pytest.approx(300 / 400)},
        "MLP": {1: pytest.approx(0.8)},
        "mixer": {2: 0.0},
    }
    assert removed_shares([site("layers.0.self_attn.o_proj", "attention", 0)]) == {"attention": {0: 1.0}}


def test_a_mixer_in_the_place_of_attention_is_a_part_of_its_own():
    sites = [
        site("model.layers.0.conv.out_proj", "mixer", 4),
        site("model.layers.1.self_attn.out_proj", "attention", 5),
        site("model.layers.2.linear_attn.in_proj_ba", "linear", 9),
    ]
    assert removed_shares(sites) == {"mixer": {0: 0.6, 2: pytest.approx(0.1)}, "attention": {1: 0.5}}


@pytest.mark.parametrize("n", [1, 2, 30, 80])
def test_every_block_has_a_bar_and_a_number_for_each_part(n):
    root = ElementTree.fromstring(draw(groups(n)))
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert {"attention, % removed", "MLP, % removed", *map(str, range(n))} <= set(texts)
    assert texts.count("50.0") >= n
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("fill")]
    assert len(bars) == 2 * n
    assert [float(bar.get("width", "")) for bar in bars[:n]] == [
        pytest.approx(BAR * (1 - b % 11 / 10)) for b in range(n)
    ]
    height, bottom = float(root.get("height", "")), max(float(bar.get("y", "")) for bar in bars)
    assert bottom < height
    assert len({bar.get("y") for bar in bars}) == n


def test_it_can_be_read_aloud_and_in_the_dark():
    root = ElementTree.fromstring(draw(groups(2)))
    assert root.get("role") == "img"
    names = {part.get("id"): part.text for part in root if part.get("id")}
    assert set((root.get("aria-labelledby") or "").split()) == set(names)
    assert "attention 95.0%; MLP 50.0%" in (names["desc"] or "")
    assert "prefers-color-scheme:dark" in (root.findtext(f"{SVG}style") or "")


def test_names_cannot_break_it():
    ElementTree.fromstring(draw([site("layers.0.<mixer&>.x", "linear", 1)]))
