"""What every exporter promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from prunekit.errors import NotVerified
from prunekit.export.compare import compare
from prunekit.export.hf import to_transformers
from prunekit.export.record import Record, continue_greedily
from prunekit.export.write import prove, write
from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import fingerprint
from prunekit.plugins.exporter import Exporter, Order, Probe, Product
from prunekit.space.forms import parse_form
from prunekit.space.prices import Workload
from prunekit.testing.models import tiny

CASES: dict[str, tuple[str, Sequence[int]]] = {  # structure, and groups of attention, of the MLP, ... in three layers
    "uneven, sub-layers lost": ("groups", (1, 7, 0, 17, 3, 0)),
    "a layer lost, the others even": ("groups", (0, 0, 2, 9, 2, 9)),
    "weights": ("weights", ()),
    "n:m": ("2:4", ()),
    "low rank": ("low-rank", ()),
}
UNEVEN, EVEN, *_ = CASES
SLACK = 1 << 18  # bytes of configs and of what else says how to compute, which no plan counts
Made = tuple[Product, Probe, Order]


def made(case: str, model_type: str = "llama", seed: int = 0) -> Made:
    """A pruned tiny model as it reaches exporters, its probe, and how it was ordered."""
    (structure, counts), adapter, rows = CASES[case], adapter_for(model_type), list[dict[str, Any]]()
    form = parse_form(structure)
    sizes = {"head_dim": 32} | ({} if counts else {"intermediate_size": 16})  # heads as engines have kernels for them
    model = tiny(model_type, seed, **sizes).float().requires_grad_(False)
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
    order = Order(adapter, form.units, "import", parameters, exported.dtype.itemsize, exported.config, settled=True)
    return Product(exported, None, {"sites": rows}), Probe(ids, logits, parameters), order


def record_of(product: Product, probe: Probe) -> Record:
    """What a model answers, as a run writes it down."""
    model: Any = product.model
    continued = continue_greedily(lambda ids: model(ids, use_cache=False).logits, probe.ids[0])
    return Record.of(probe.ids, probe.logits, model.dtype, probe.parameters, continued)


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """What an exporter has written once, for tests that only read it or copy it."""

    product: Product
    probe: Probe
    folder: Path

    def copied(self, folder: Path) -> Path:
        """A copy that may be changed."""
        return shutil.copytree(self.folder, folder, dirs_exist_ok=True)


class ExporterSuite:
    """What is written is what was promised, damage is noticed, and nothing else is touched."""

    plugin: ClassVar[Exporter]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Models of every structure it can write."""
        if "case" in metafunc.fixturenames:
            units = {case: parse_form(structure).units for case, (structure, _) in CASES.items()}
            metafunc.parametrize("case", [case for case in CASES if units[case] in self.plugin.structures])

    @pytest.fixture(scope="class")
    @classmethod
    def shared(cls, tmp_path_factory: pytest.TempPathFactory) -> Shared:
        """A model of uneven sizes, written once for all tests."""
        product, probe, _ = made(UNEVEN)
        folder = tmp_path_factory.mktemp("written")
        write([cls.plugin], product, folder)
        return Shared(product, probe, folder)

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Exporter:
        """The exporter, where the engine that runs its files is installed."""
        plugin = cls.plugin
        if not plugin.engine or None in map(find_spec, (*plugin.modules, *plugin.engine_modules)):
            pytest.skip(f"no engine is installed for {type(plugin).__name__}")
        return plugin

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
    def test_damage_is_noticed(self, damage: str, shared: Shared, tmp_path: Path) -> None:
        folder = shared.copied(tmp_path)
        largest = max(self.plugin.files(folder), key=lambda file: file.stat().st_size)
        content = largest.read_bytes()
        if damage == "lost":
            largest.unlink()
        else:
            half = len(content) // 2
            largest.write_bytes(content[:half] + b"\xff" * (len(content) - half))
        with pytest.raises(NotVerified):
            prove([self.plugin], folder, shared.probe)

    def test_another_model_is_noticed(self, shared: Shared) -> None:
        with pytest.raises(NotVerified):
            prove([self.plugin], shared.folder, made(EVEN, seed=1)[1])

    def test_its_engine_answers_what_the_model_does(self, shared: Shared, engine: Exporter) -> None:
        record, path = record_of(shared.product, shared.probe), shared.folder / engine.place
        before = _bytes(shared.folder)
        rows = compare(record, engine.answers(path, record.inquiry), engine.tolerance(path, shared.product.model.dtype))
        assert [row for row in rows if row.agrees is False] == []
        assert any(row.what == "greedy tokens" for row in rows)
        assert _bytes(shared.folder) == before

    def test_its_engine_does_not_answer_what_another_model_does(self, shared: Shared, engine: Exporter) -> None:
        product, probe, _ = made(UNEVEN, seed=1)  # as large, with other weights
        record, path = record_of(product, probe), shared.folder / engine.place
        rows = compare(record, engine.answers(path, record.inquiry), engine.tolerance(path, product.model.dtype))
        assert "log-probabilities" in [row.what for row in rows if row.agrees is False]

    def test_its_engine_does_not_answer_for_a_damaged_file(
        self, shared: Shared, engine: Exporter, tmp_path: Path
    ) -> None:
        folder, inquiry = shared.copied(tmp_path), record_of(shared.product, shared.probe).inquiry
        max(engine.files(folder), key=lambda file: file.stat().st_size).write_bytes(b"nothing")
        with pytest.raises(NotVerified):
            engine.answers(folder / engine.place, inquiry)

    def test_its_engine_is_timed_again_and_again(self, shared: Shared, engine: Exporter) -> None:
        if (timer := engine.timer(shared.folder / engine.place)) is not None:
            times = [timer(Workload(1, 8, 2)) for _ in range(2)]
            assert all(isinstance(part, int) and part > 0 for turn in times for part in turn)

    def test_a_model_is_not_written_over_another(self, shared: Shared, tmp_path: Path) -> None:
        folder = shared.copied(tmp_path)
        before = _bytes(folder)
        with pytest.raises(FileExistsError):
            self.plugin.write(made(EVEN)[0], folder / self.plugin.place)
        assert _bytes(folder) == before

    def test_the_same_model_makes_the_same_bytes(self, shared: Shared, tmp_path: Path) -> None:
        write([self.plugin], made(UNEVEN)[0], tmp_path)
        assert _bytes(tmp_path) == _bytes(shared.folder) != {}

    def test_other_files_stay_and_are_not_its_own(self, shared: Shared, tmp_path: Path) -> None:
        others = {"notes.txt": b"mine", "more/report.html": b"also mine"}
        for name, content in others.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        write([self.plugin], shared.product, tmp_path)
        assert others.items() <= _bytes(tmp_path).items()
        assert not {str(file.relative_to(tmp_path)) for file in self.plugin.files(tmp_path)} & others.keys()


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
