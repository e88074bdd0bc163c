"""Family x structure x format: built, saved, loaded, the same logits, and speed beside the dense model.

    python benchmarks/matrix.py --families llama,phi3 --formats hf,gguf --rounds 7

Models of random weights in float32, half of every site removed. `uneven`: one attention and one MLP are dropped whole,
others keep different counts; `equal`: all layers keep the same. Experts are never dropped altogether, and `equal` keeps
three quarters of them; `neurons`: of every expert half of its neurons, or other numbers by layer. Parity is the
greatest difference of a logit between the model in memory and the one that transformers loads; other formats are proved
as a run proves them, and `--fresh` proves all, in a process of its own.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from prunekit.errors import NotVerified, WrongInput
from prunekit.export.hf import to_transformers
from prunekit.export.write import prove, write
from prunekit.layer.candidates import Candidate
from prunekit.layer.layouts import layout_of
from prunekit.measure.rounds import Ratio
from prunekit.measure.speed import Speed, speeds
from prunekit.models import classes
from prunekit.models.adapters.find import adapter_for
from prunekit.models.configs import auto_class
from prunekit.models.opening import without_bars
from prunekit.plugins.adapter import ModelAdapter, UnsupportedModel
from prunekit.plugins.exporter import Exporter, Order, Probe, Product
from prunekit.plugins.registry import ADAPTERS, EXPORTERS
from prunekit.space.forms import parse_form
from prunekit.space.sites import Site
from prunekit.testing.models import EXPERTS, HYBRIDS, SIZES, tiny

HIDDEN, WIDTH, HEAD, VOCABULARY, POSITIONS, EXPERT = 192, 768, 32, 1024, 512, 8
MIXTURES = {name: sizes for name, sizes in (EXPERTS | HYBRIDS).items() if "num_experts_per_tok" in sizes}
IDS = torch.arange(2, 130).reshape(2, 64)


def uneven(site: Site) -> int:
    """Groups kept: no attention in the first block, no MLP in the last, elsewhere half and a quarter."""
    if (site.block, site.kind) in ((0, "attention"), (2, "mlp")):
        return site.least
    return max(1, site.least, site.n_groups // (2 + 2 * (site.block % 2)))


def equal(site: Site) -> int:
    """Groups kept: half, of whole experts three quarters."""
    return 3 * site.n_groups // 4 if site.kind == "experts" else max(1, site.n_groups // 2)


STRUCTURES: dict[str, tuple[str, Callable[[Site], int]]] = {  # the form, and the counts of groups
    "groups, uneven": ("groups", uneven),
    "groups, equal": ("groups", equal),
    "neurons, uneven": ("groups", uneven),
    "neurons, equal": ("groups", equal),
    "weights": ("weights", lambda site: site.n_groups // 2),
    "2:4": ("2:4", lambda site: site.n_groups // 2),
}


@dataclass(frozen=True)
class Row:
    """One family, one structure, one format."""

    family: str
    structure: str
    format: str
    kept: float | None = None  # share of the parameters of the dense model
    class_: str = ""
    parity: str = ""  # greatest difference of a logit, or what was said instead
    prefill: str = ""
    decode: str = ""

    def __str__(self) -> str:
        kept = "" if self.kept is None else f"{self.kept:.0%}"
        cells = self.family, self.structure, self.format, kept, self.class_, self.parity, self.prefill, self.decode
        return f"| {' | '.join(cells)} |"


def dense_of(name: str) -> PreTrainedModel:
    """A model of random weights, large enough to be timed."""
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    if name in MIXTURES:
        sizes |= {"num_experts": EXPERT, "num_local_experts": EXPERT, "intermediate_size": HIDDEN}
        sizes = {key: value for key, value in sizes.items() if key in MIXTURES[name] or "num" not in key}
        sizes |= {key: HIDDEN for key in MIXTURES[name] if key.endswith("_intermediate_size")}
    elif name in classes.FAMILIES:
        sizes[classes.FAMILIES[name].width] = WIDTH
        sizes |= {"head_dim": HEAD} if "head_dim" in (SIZES | HYBRIDS).get(name, {}) else {}
    if name == "qwen2_5_vl":  # pairs of channels that rotate by each of the three positions
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    if name == "mamba2":
        sizes["head_dim"] = HIDDEN // 2
    elif name == "gpt2":
        sizes["n_inner"] = WIDTH
    model = adapter_for(name).opened(tiny(name, **sizes, initializer_range=0.02)).float().requires_grad_(False)
    if name in MIXTURES:
        model.set_experts_implementation("grouped_mm")  # as one that is loaded
    return model


def cut(dense: PreTrainedModel, adapter: ModelAdapter, structure: str) -> PreTrainedModel:
    """The dense model without half of it, as it is exported.

    Raises:
        UnsupportedModel: the family has no groups.
    """
    form, count = parse_form(STRUCTURES[structure][0]), STRUCTURES[structure][1]
    model = copy.deepcopy(dense)
    for site in adapter.sites_of(model, form, experts="neurons" if "neurons" in structure else "whole"):
        weight = adapter.linear(adapter.blocks(model)[site.block], site).weight
        half = Candidate(None, weight * (torch.arange(site.d_in) % 2))
        adapter.remove(model, site, layout_of(site).stand_in(site, count(site), weight) if form.shrinks else half)
    return to_transformers(model, adapter)


@torch.no_grad()
def parity(exporter: Exporter, product: Product, folder: Path, fresh: bool) -> str:
    """What is read of the written model beside the one in memory."""
    model = product.model
    probe = Probe(IDS, model(IDS, use_cache=False).logits, sum(p.numel() for p in model.parameters()))
    write([exporter], product, folder)
    if fresh or exporter.place:
        prove([exporter], folder, probe)
        return "proved"
    loaded = auto_class(model.config).from_pretrained(folder, dtype=torch.float32).eval()
    if type(loaded) is not type(model) or sum(p.numel() for p in loaded.parameters()) != probe.parameters:
        return "another model"
    apart = float((loaded(IDS, use_cache=False).logits - probe.logits).abs().max())
    return f"{apart:.0e}" if apart else "equal"


def rows(name: str, formats: Sequence[str], rounds: int, fresh: bool) -> Iterator[Row]:
    """All of one family."""
    adapter, dense = adapter_for(name), dense_of(name)
    for structure, (form, _) in STRUCTURES.items():
        if "neurons" in structure and name not in MIXTURES:
            continue
        try:
            small = cut(dense, adapter, structure)
        except UnsupportedModel:
            yield Row(name, structure, "", parity="no groups" if parse_form(form).shrinks else "refused")
            continue
        kept = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
        found: dict[str, Speed] = {}
        if parse_form(form).shrinks and rounds:
            found = speeds({"dense": dense, "small": small}, rounds=rounds, fewest=rounds)
        ratio = {
            each: str(Ratio.of(getattr(found["small"], each), getattr(found["dense"], each))) if found else ""
            for each in ("prefill", "decode")
        }
        for exporter in map(EXPORTERS.build, formats):
            order = Order(
                adapter, parse_form(form).units, "import", small.num_parameters(), 4, config=small.config, settled=True
            )
            with tempfile.TemporaryDirectory() as folder, without_bars():
                try:
                    if order.units not in exporter.structures:
                        raise WrongInput("not its structure")
                    exporter.check(order)
                    said = parity(exporter, Product(small), Path(folder) / "model", fresh)
                except (WrongInput, NotVerified) as error:
                    said = str(error)
            named = EXPORTERS.name_of(exporter) or type(exporter).__name__
            yield Row(name, structure, named, kept, type(small).__name__, said, **ratio)


def main(
    families: Annotated[str, typer.Option(help="by comma; all that are registered, if none is named")] = "",
    formats: Annotated[str, typer.Option(help="by comma; all that are registered, if none is named")] = "",
    rounds: Annotated[int, typer.Option(help="in which speeds are taken, at least 6; 0: none")] = 7,
    fresh: Annotated[bool, typer.Option(help="load in a process of its own")] = False,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    classes.register()
    print("| family | structure | format | parameters | class | parity | prefill | decode |")
    print("|---|---|---|---|---|---|---|---|")
    for name in families.split(",") if families else ADAPTERS:
        for row in rows(name, formats.split(",") if formats else [*EXPORTERS], rounds, fresh):
            print(row, flush=True)


if __name__ == "__main__":
    typer.run(main)
