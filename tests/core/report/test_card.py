"""The card tells what was made of what, and nothing of the machine it was made on."""

import json
import re

import yaml

from prunekit.recipe.schema import Recipe
from prunekit.report.card import card, write


def document(model, source="python-docs, split 'train'"):
    sites = [
        {"name": "model.layers.0.self_attn.o_proj", "block": 0, "kind": "attention", "groups": 4, "kept": 2},
        {"name": "model.layers.0.mlp.down_proj", "block": 0, "kind": "mlp", "groups": 8, "kept": 8},
    ]
    size = {"parameters": 100, "block_parameters": 80, "sparsity_of_blocks": 0.5}
    return {
        "model": model,
        "dense": size, "pruned": size, "versions": {"prunekit": "0.1.0"}, "data": {"source": source},
        "losses": {which: {"perplexity": 9.0, "label": "ppl/prose/seq16"} for which in ("dense", "pruned")},
        "sites": [{**site, "parameters": 10, "error": 0.1} for site in sites],
    }  # fmt: skip


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_base_model_is_named_when_it_is_on_the_hub(tmp_path, monkeypatch):
    text = card(document("owner/name"), Recipe.load(), {"license": "mit"})
    assert front(text) == {
        "base_model": "owner/name", "tags": ["prunekit", "pruned"], "library_name": "transformers",
        "pipeline_tag": "text-generation", "license": "mit",
    }  # fmt: skip
    assert "# name, 50.0% of the block parameters removed" in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    for model in ("owner/name", str(tmp_path / "owner/name"), "LlamaForCausalLM", "gpt2"):
        assert "base_model" not in front(card(document(model), Recipe.load(), {}))


def test_tensors_in_another_dtype_are_told():
    found = document("owner/name")
    assert "read and written" not in card(found, Recipe.load(), {})
    found["dense"] = {**found["dense"], "converted": {"float32": 5}, "dtype": "bfloat16"}
    said = (
        "The checkpoint holds 5 parameters in float32: they are read and written in bfloat16, the dtype of the model."
    )
    assert said in card(found, Recipe.load(), {})


def test_no_local_path_is_in_it(tmp_path):
    text = tmp_path / "private" / "prose.txt"
    text.parent.mkdir()
    text.write_text("x")
    recipe = Recipe.load().with_overrides(
        {"data.dataset": [str(text), "owner/data", "~/more/b.jsonl"], "pruner": "wanda"}
    )
    said = f"{text}, owner/data, split 'train', field 'text', ~/more/b.jsonl, field 'text'"
    found = card(document(str(tmp_path / "private" / "model"), said), recipe, {})
    assert "# model, 50.0%" in found
    assert "search: prose.txt, owner/data, split 'train', field 'text', b.jsonl, field 'text'." in found
    assert str(tmp_path) not in found
    assert "private" not in found
    assert "~" not in found


def test_what_is_written_lies_beside_each_other(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: no\n---\n")
    (source / "LICENSE").write_text("terms")
    write(document(str(source)), Recipe.load(), out)
    assert {file.name for file in out.iterdir()} == {"LICENSE", "README.md", "report.json", "sparsity.svg"}
    text = (out / "README.md").read_text()
    assert front(text).items() >= {"license": "apache-2.0", "language": "no"}.items()
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", text)
    assert (out / picture).read_text().startswith("<svg")
    assert (out / "LICENSE").read_text() == "terms"
    assert json.loads((out / "report.json").read_text())["model"] == str(source)  # the report is for the one who ran it
