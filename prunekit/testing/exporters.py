"""What every exporter promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from prunekit.errors import NotVerified
from prunekit.export.hf import to_transformers
from prunekit.export.write import prove, write
from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import fingerprint
from prunekit.plugins.exporter import Exporter, Order, Probe, Product
from prunekit.space.forms import parse_form
from prunekit.testing.models import tiny

CASES: dict[str, tuple[str, Sequence[int]]] = {  # structure, and groups of attention, of the MLP, ... in three layers
    "uneven, sub-layers lost": ("groups", (1, 7, 0, 17, 3, 0)),
    "a layer lost, the others even": ("groups", (0, 0, 2, 9, 2, 9)),
    "weights": ("weights", ()),
    "n:m": ("2:4", ()),
    "low rank": ("low-rank", ()),
}
UNEVEN, EVEN, *_ = CASES
SLACK = 1 << 16  # bytes of configs, which no plan counts
Made = tuple[Product, Probe, Order]


def made(case: str, model_type: str = "llama", seed: int = 0) -> Made:
    """A pruned tiny model as it reaches exporters, its probe, and how it was ordered."""
    (structure, counts), adapter, rows = CASES[case], adapter_for(model_type), list[dict[str, Any]]()
    form = parse_form(structure)
    model = tiny(model_type, seed, **({} if counts else {"intermediate_size": 16})).float().requires_grad_(False)
    for number, site in enumerate(adapter.sites_of(model, form)):
        weight = adapter.linear(adapter.blocks(model)[site.block], site).weight
        kept = counts[number] if counts else site.n_groups // 2
        half = Candidate(None, weight * (torch.arange(site.d_in) % 2))
        if form.shrinks and not form.coupled and number % 5:  # some maps stay whole
            half = Candidate(None, weight, (weight[:, :1].repeat(1, kept), weight[:1].repeat(kept, 1)))
        adapter.remove(model, site, Candidate(tuple(range(kept)), weight) if counts else half)
        rows.append({"name": site.name, "groups": site.n_groups, "kept": kept})
    exported, ids = to_transformers(model, adapter), torch.arange(2, 14)[None]
    with torch.no_grad():
        logits = exported(ids, use_cache=False).logits
    parameters = sum(p.numel() for p in exported.parameters())
    order = Order(adapter, form.units, "import", parameters, exported.dtype.itemsize)
    return Product(exported, None, {"sites": rows}), Probe(ids, logits, parameters), order


class ExporterSuite:
    """What is written is what was promised, damage is noticed, and nothing else is touched."""

    plugin: ClassVar[Exporter]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Models of every structure it can write."""
        if "case" in metafunc.fixturenames:
            units = {case: parse_form(structure).units for case, (structure, _) in CASES.items()}
            metafunc.parametrize("case", [case for case in CASES if units[case] in self.plugin.structures])

    def test_is_a_frozen_dataclass_with_a_place(self) -> None:
        assert dataclasses.is_dataclass(self.plugin)
        assert hash(self.plugin) == hash(dataclasses.replace(self.plugin))  # type: ignore[type-var]
        assert self.plugin.place == Path(self.plugin.place).name, "a place is one name in the folder of a result"
        assert self.plugin.place != ".."

    def test_what_is_written_is_what_was_promised(self, case: str, tmp_path: Path) -> None:
        product, probe, order = made(case)
        before = fingerprint(product.model)
        self.plugin.check(order)
        write([self.plugin], product, tmp_path)  # which sees that nothing else is touched
        prove([self.plugin], tmp_path, probe)
        assert fingerprint(product.model) == before
        there = sorted(file for file in tmp_path.rglob("*") if file.is_file())
        assert sorted(self.plugin.files(tmp_path)) == there
        written = sum(file.stat().st_size for file in there)
        assert written / 2 - SLACK <= self.plugin.size(order) <= 2 * written + SLACK

    @pytest.mark.parametrize("damage", ["changed", "lost"])
    def test_damage_is_noticed(self, damage: str, tmp_path: Path) -> None:
        probe = self._written(tmp_path)
        largest = max(self.plugin.files(tmp_path), key=lambda file: file.stat().st_size)
        content = largest.read_bytes()
        if damage == "lost":
            largest.unlink()
        else:
            half = len(content) // 2
            largest.write_bytes(content[:half] + b"\xff" * (len(content) - half))
        with pytest.raises(NotVerified):
            prove([self.plugin], tmp_path, probe)

    def test_another_model_is_noticed(self, tmp_path: Path) -> None:
        self._written(tmp_path)
        with pytest.raises(NotVerified):
            prove([self.plugin], tmp_path, made(EVEN, seed=1)[1])

    def test_a_model_is_not_written_over_another(self, tmp_path: Path) -> None:
        self._written(tmp_path)
        before = _bytes(tmp_path)
        with pytest.raises(FileExistsError):
            self.plugin.write(made(EVEN)[0], tmp_path / self.plugin.place)
        assert _bytes(tmp_path) == before

    def test_the_same_model_makes_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            self._written(tmp_path / name)
        assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two") != {}

    def test_other_files_stay_and_are_not_its_own(self, tmp_path: Path) -> None:
        others = {"notes.txt": b"mine", "more/report.html": b"also mine"}
        for name, content in others.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        self._written(tmp_path)
        assert others.items() <= _bytes(tmp_path).items()
        assert not {str(file.relative_to(tmp_path)) for file in self.plugin.files(tmp_path)} & others.keys()

    def _written(self, folder: Path) -> Probe:
        product, probe, _ = made(UNEVEN)
        write([self.plugin], product, folder)
        return probe


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
