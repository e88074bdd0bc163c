"""The table of families, structures and formats: nobody is said to have answered who was not asked, nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import prunekit as pk
from prunekit.testing import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = import_module("matrix")
    monkeypatch.setattr(found, "IDS", torch.arange(2, 34).reshape(2, 16))
    return found


@dataclass(frozen=True)
class Pretended(pk.Exporter):
    """Writes into the folder that transformers loads, for an engine of its own."""

    engine: ClassVar[str] = "pretended"
    apart: float = 0.0
    fails: bool = False

    @property
    def place(self) -> str:
        return ""

    def write(self, product: pk.Product, path: Path) -> None:
        product.model.save_pretrained(path)

    def verify(self, path: Path, probe: pk.Probe) -> None:
        raise AssertionError("it would ask transformers alone")

    def files(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("*"))

    @torch.no_grad()
    def answers(self, path: Path, inquiry: pk.Inquiry) -> pk.Response:
        if self.fails:
            raise pk.NotVerified(f"pretended does not run {path}: it is odd")
        model: Any = tiny("llama").float()
        logprobs, likeliest = pk.Response.read(model(inquiry.ids, use_cache=False).logits, inquiry)
        made = model.generate(inquiry.prompt[None], max_new_tokens=inquiry.new_tokens, do_sample=False, pad_token_id=0)
        return pk.Response(logprobs + self.apart, likeliest, made[0, len(inquiry.prompt) :])


def test_only_the_engine_of_a_format_says_that_it_is_right(
    matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = pk.Product(tiny("llama").float())
    reached, parity, engine, why = matrix.loaded(Pretended(), product, tmp_path / "one")
    assert (reached, engine, why) == ("loaded", "pretended", "")
    assert float(parity.removesuffix(" nats")) <= 1e-4
    reached, parity, engine, why = matrix.loaded(Pretended(apart=0.1), product, tmp_path / "two")
    assert (reached, parity, engine) == ("loaded", "differs", "pretended")
    assert why.startswith("log-probabilities: within 0.1")
    found = matrix.loaded(Pretended(fails=True), product, tmp_path / "failed")
    assert found == ("saved", "not loaded", "", "pretended does not run it: it is odd")
    monkeypatch.setattr(matrix, "why_not_run", lambda _: "it is not installed")
    found = matrix.loaded(Pretended(), product, tmp_path / "three")
    assert found == ("saved", "nobody was asked", "", "it is not installed")


def test_a_row_is_built_saved_loaded_and_equal(matrix: Any) -> None:
    row = matrix.row_of("llama", "groups, uneven", "hf", 0)
    assert (row.reached, row.class_, row.parity) == ("loaded", "PrunekitLlamaForCausalLM", "equal")
    assert (row.engine, row.why, row.load, 0.3 < row.kept < 0.5) == ("transformers", "", None, True)
    refused = matrix.row_of("mixtral", "neurons, uneven", "gguf", 0)
    assert (refused.reached, refused.parity, refused.engine) == ("refused", "", "")
    assert "layers differ in size" in refused.why


def test_rows_that_are_there_are_not_run_again_and_none_is_lost(
    matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, rows, docs = list[tuple[str, ...]](), tmp_path / "rows.jsonl", tmp_path / "families.md"

    def row_of(family: str, structure: str, format_: str, _: int) -> Any:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((family, structure, format_))
        return matrix.Row(family, structure, format_, "loaded", 0.5, "Class", "equal", "transformers")

    def run(families: str, **more: Any) -> None:
        matrix.main(families, "hf", ["weights"], rounds=0, rows=rows, **{"docs": None, "run": True} | more)

    monkeypatch.setattr(matrix, "row_of", row_of)
    run("llama,opt")
    run("llama,opt,phi3")
    assert [family for family, _, _ in ran] == ["llama", "opt", "phi3"]
    with pytest.raises(KeyboardInterrupt):
        run("llama,mixtral")
    with rows.open("a") as file:
        file.write('{"family": "gemma2", "struc')  # as an interruption leaves it
    docs.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n")
    run("", docs=docs, run=False)
    text = docs.read_text()
    assert text.startswith(f"before\n{matrix.BEGIN}\n\n| family |")
    assert text.endswith(f"{matrix.END}\nafter\n")
    assert "old" not in text
    assert "| phi3 | weights | hf | 50% | Class | equal | transformers |  |  |" in text
    assert "Not run:" in text.partition("phi3")[2]
    run("", docs=docs, run=False)
    assert docs.read_text() == text
    docs.write_text("no marks")
    with pytest.raises(pk.WrongInput, match="put them where tables belong"):
        run("", docs=docs, run=False)


def test_what_is_refused_or_fails_or_was_not_run_is_told(matrix: Any) -> None:
    rows = [
        matrix.Row("llama", "groups, equal", "hf", "loaded", 0.5, "Llama", "equal", "transformers", load=2.5),
        matrix.Row("opt", "groups, equal", "gguf", "refused", 0.5, "OPT", why="no graph has it"),
        matrix.Row("opt", "weights", "gguf", "refused", 1.0, "OPT", why="no graph has it"),
        matrix.Row("phi3", "groups, equal", "vllm", "saved", 0.5, "Phi3", "nobody was asked", why="not installed"),
    ]
    wanted = [*(row.key for row in rows), ("phi3", "groups, uneven", "vllm"), ("opt", "groups, uneven", "vllm")]
    text = matrix.tables({row.key: row for row in rows}, wanted)
    assert "| phi3 | groups, equal | vllm | 50% | Phi3 | nobody was asked |  |  |  |" in text
    assert "- `gguf`, opt (groups, equal; weights): no graph has it" in text
    assert "- `vllm`, phi3 (groups, equal): not installed" in text
    assert "- `vllm`, phi3, opt (groups, uneven)" in text.partition("Not run:")[2]
    assert "2.5 to 2.5 busy processes" in text
    assert text.splitlines()[:5] == [
        "| family | hf | gguf | vllm |",
        "|---|---|---|---|",
        "| llama | all |  |  |",
        "| opt |  | none | none |",
        "| phi3 |  |  | none |",
    ]
    more = rows[0].__class__("llama", "weights", "hf", "loaded", 1.0, "Llama", "differs", "transformers", why="odd")
    text = matrix.tables({row.key: row for row in [*rows, more]}, [*wanted, more.key])
    assert "| llama | groups, equal |  |  |" in text
    other = rows[0].__class__("llama", "2:4", "hf", "loaded", 1.0, "Llama", "equal", "transformers")
    text = matrix.tables({row.key: row for row in [*rows, more, other]}, [*wanted, more.key, other.key])
    assert "| llama | all but weights |  |  |" in text


def test_the_document_has_the_table_that_is_made(matrix: Any) -> None:
    text = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    inside = text.partition(matrix.BEGIN)[2].partition(matrix.END)[0]
    assert inside.strip().startswith("| family | hf | gguf | onnx | vllm |")
    assert f"| {' | '.join(matrix.COLUMNS)} |" in inside
