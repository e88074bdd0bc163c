"""Family x structure x format: built, saved, loaded, the same answers, and speed beside the dense model.

    python benchmarks/matrix.py --rows matrix.jsonl --docs docs/families.md
    python benchmarks/matrix.py --families llama,phi3 --formats hf,gguf --rounds 7

Models of random weights in float32, half of every site removed. `uneven`: one attention and one MLP are dropped whole,
others keep different counts; `equal`: all layers keep the same. Experts are never dropped altogether, and `equal` keeps
three quarters of them; `neurons`: of every expert half of its neurons, or other numbers by layer; `mlps`: half of every
MLP and nothing else, of families that other programs take with all heads alone.

What transformers loads is compared here with the model in memory, logit by logit; every other format is asked in the
engine that runs it, in a process of its own, for log-probabilities and greedy tokens (`Exporter.answers`). A row whose
engine is not installed says that nobody was asked. Rows are added to the file `--rows` one by one; those that are there
are not run again. `--docs` puts the tables of all rows of the file between the two marks of a document.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from prunekit.errors import NotVerified, WrongInput, first_line
from prunekit.export.compare import compare
from prunekit.export.formats import why_not_run
from prunekit.export.hf import to_transformers
from prunekit.export.write import write
from prunekit.layer.candidates import Candidate
from prunekit.layer.layouts import layout_of
from prunekit.measure.ratios import Ratio
from prunekit.measure.speed import speeds
from prunekit.models import classes
from prunekit.models.adapters.find import adapter_for
from prunekit.models.configs import auto_class
from prunekit.models.opening import without_bars
from prunekit.plugins.adapter import ModelAdapter, UnsupportedModel
from prunekit.plugins.exporter import Exporter, Order, Probe, Product
from prunekit.plugins.registry import ADAPTERS, EXPORTERS
from prunekit.space.forms import parse_form
from prunekit.space.sites import Site
from prunekit.system.files import write_bytes
from prunekit.testing.exporters import record_of
from prunekit.testing.models import EXPERTS, HYBRIDS, SIZES, tiny

HIDDEN, WIDTH, HEAD, VOCABULARY, POSITIONS, EXPERT = 192, 768, 32, 1024, 512, 8
MIXTURES = {name: sizes for name, sizes in (EXPERTS | HYBRIDS).items() if "num_experts_per_tok" in sizes}
OTHERWISE: dict[str, dict[str, Any]] = {  # as released models of the family are, where that decides what is written
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "olmoe": {"num_key_value_heads": 6},
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        }
    },
    "llava": {"intermediate_size": WIDTH},
    "lfm2": {"conv_dim": HIDDEN, "block_dim": HIDDEN},
    "qwen3_next": {  # vLLM's kernels for CPUs take heads of 64 or 128
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
}
IDS = torch.arange(2, 130).reshape(2, 64)
BEGIN, END = "<!-- rows of benchmarks/matrix.py -->", "<!-- end of rows -->"
WHOLE_HEADS = ("falcon", "lfm2", "qwen2_5_vl")  # whose stock classes hold no fewer heads, or no fewer channels
WITH_ZEROS = ("hf", "gguf")  # formats that are tried with zeros in dense matrices; others store them as any number
COLUMNS = "family", "structure", "format", "parameters", "class", "parity", "engine", "prefill", "decode"


def uneven(site: Site) -> int:
    """Groups kept: no attention in the first block, no MLP in the last, elsewhere half and a quarter."""
    if (site.block, site.kind) in ((0, "attention"), (2, "mlp")):
        return site.least
    return max(1, site.least, site.n_groups // (2 + 2 * (site.block % 2)))


def equal(site: Site) -> int:
    """Groups kept: half, of whole experts three quarters."""
    return 3 * site.n_groups // 4 if site.kind == "experts" else max(1, site.n_groups // 2)


def mlps(site: Site) -> int:
    """Groups kept: all, of MLPs half."""
    return site.n_groups // 2 if site.kind == "mlp" else site.n_groups


STRUCTURES: dict[str, tuple[str, Callable[[Site], int]]] = {  # the form, and the counts of groups
    "groups, uneven": ("groups", uneven),
    "groups, equal": ("groups", equal),
    "neurons, uneven": ("groups", uneven),
    "neurons, equal": ("groups", equal),
    "mlps, equal": ("groups", mlps),
    "weights": ("weights", lambda site: site.n_groups // 2),
    "2:4": ("2:4", lambda site: site.n_groups // 2),
}


@dataclass(frozen=True)
class Row:
    """One family, one structure, one format."""

    family: str
    structure: str
    format: str
    reached: str  # refused, built, saved or loaded: the last step that was done
    kept: float | None = None  # share of the parameters of the dense model
    class_: str = ""
    parity: str = ""  # with the model in memory
    engine: str = ""  # that has loaded it
    why: str = ""  # it went no further
    prefill: str = ""  # in times of the dense model
    decode: str = ""
    load: float | None = None  # average of the machine when speeds were taken, in processes for every core

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is of."""
        return self.family, self.structure, self.format

    def __str__(self) -> str:
        kept = "" if self.kept is None else f"{self.kept:.0%}"
        cells = *self.key, kept, self.class_, self.parity, self.engine, self.prefill, self.decode
        return f"| {' | '.join(cells)} |"


def dense_of(name: str) -> PreTrainedModel:
    """A model of random weights, large enough to be timed."""
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    if name in MIXTURES:
        sizes |= {"num_experts": EXPERT, "num_local_experts": EXPERT, "intermediate_size": HIDDEN}
        sizes = {key: value for key, value in sizes.items() if key in MIXTURES[name] or "num" not in key}
        sizes |= {key: HIDDEN for key in MIXTURES[name] if key.endswith("_intermediate_size")}
        sizes |= {"head_dim": HEAD} if "head_dim" in MIXTURES[name] else {}
    elif name in classes.FAMILIES:
        sizes[classes.FAMILIES[name].width] = WIDTH
        sizes |= {"head_dim": HEAD} if "head_dim" in (SIZES | HYBRIDS).get(name, {}) else {}
    if name == "mamba2":
        sizes["head_dim"] = HIDDEN // 2
    elif name == "gpt2":
        sizes["n_inner"] = WIDTH
    sizes |= OTHERWISE.get(name, {}) | {"initializer_range": 0.02}
    model = adapter_for(name).opened(tiny(name, **sizes)).float().requires_grad_(False)
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
def loaded(exporter: Exporter, product: Product, folder: Path) -> tuple[str, str, str, str]:
    """(the step reached, parity, engine, why it went no further) of a model that is in memory and in a folder."""
    model: Any = product.model
    probe = Probe(IDS, model(IDS, use_cache=False).logits, sum(p.numel() for p in model.parameters()))
    record = record_of(product, probe)
    write([exporter], product, folder)
    if exporter.engine == "transformers":
        return _in_transformers(model, probe, folder)
    if not exporter.engine:
        return "saved", "", "", "no engine of it is known"
    if (why := why_not_run(exporter)) is not None:
        return "saved", "nobody was asked", "", why
    path = folder / exporter.place
    try:
        response = exporter.answers(path, record.inquiry)
    except NotVerified as error:
        return "saved", "not loaded", "", first_line(error).replace(str(path), "it")
    found = compare(record, response, exporter.tolerance(path, torch.float32))
    if wrong := [row for row in found if row.agrees is False]:
        return "loaded", "differs", exporter.engine, f"{wrong[0].what}: {wrong[0].found}, not {wrong[0].judged}"
    told = ~response.logprobs.isnan()
    apart = float((response.logprobs - record.logprobs).abs()[told].max())
    return "loaded", f"{apart:.0e} nats", exporter.engine, ""


def _in_transformers(model: Any, probe: Probe, folder: Path) -> tuple[str, str, str, str]:
    """The same, of every logit to the bit, in this process."""
    found = auto_class(model.config).from_pretrained(folder, dtype=torch.float32).eval()
    if type(found) is not type(model) or sum(p.numel() for p in found.parameters()) != probe.parameters:
        return "loaded", "differs", "transformers", f"another model: {type(found).__name__}"
    apart = float((found(IDS, use_cache=False).logits - probe.logits).abs().max())
    same = apart <= 1e-4
    return "loaded", "equal" if not apart else f"{apart:.0e}" if same else "differs", "transformers", ""


def row_of(name: str, structure: str, format_: str, rounds: int) -> Row:
    """Build, save, load, ask and, of the folder that transformers loads, time."""
    adapter, form = adapter_for(name), parse_form(STRUCTURES[structure][0])
    dense, exporter, row = dense_of(name), EXPORTERS.build(format_), Row(name, structure, format_, "refused")
    try:
        small = cut(dense, adapter, structure)
    except UnsupportedModel as error:
        return replace(row, why=first_line(error))
    kept = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
    row = replace(row, kept=kept, class_=type(small).__name__)
    order = Order(adapter, form.units, "import", small.num_parameters(), 4, config=small.config, settled=True)
    with tempfile.TemporaryDirectory() as folder, without_bars():
        try:
            if order.units not in exporter.structures:
                raise WrongInput(f"format {format_!r} does not know structure {order.units}")
            exporter.check(order)
        except WrongInput as error:
            return replace(row, why=str(error))
        try:
            reached, parity, engine, why = loaded(exporter, Product(small), Path(folder) / "model")
        except Exception as error:  # one that fails is a row, and others go on
            return replace(row, reached="built", parity="failed", why=f"{type(error).__name__}: {first_line(error)}")
    row = replace(row, reached=reached, parity=parity, engine=engine, why=why)
    if not (form.shrinks and rounds and exporter.engine == "transformers"):
        return row
    load, timed = os.getloadavg()[0] / (os.cpu_count() or 1), {"dense": dense, "small": small}
    found = speeds(timed, rounds=rounds, fewest=rounds)
    prefill, decode = (
        str(Ratio.of(getattr(found["small"], each), getattr(found["dense"], each))) for each in ("prefill", "decode")
    )
    return replace(row, prefill=prefill, decode=decode, load=round(load, 2))


def jobs(families: Sequence[str], structures: Sequence[str], formats: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """What is to be tried: of one format and one structure all families, and then the next."""
    for format_ in formats:
        for structure in structures:
            if format_ not in WITH_ZEROS and not parse_form(STRUCTURES[structure][0]).shrinks:
                continue
            only = MIXTURES if "neurons" in structure else WHOLE_HEADS if "mlps" in structure else families
            for family in families:
                if family in only:
                    yield family, structure, format_


def read(path: Path) -> dict[tuple[str, str, str], Row]:
    """Rows of a file, by what they are of; of two of the same, the later."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = (Row(**json.loads(line)) for line in lines if line.endswith("}"))  # an interrupted line has no end
    return {row.key: row for row in found}


def tables(rows: Mapping[tuple[str, str, str], Row], wanted: Iterable[tuple[str, str, str]]) -> str:
    """All rows as a document has them: a table of a row for every family, what was loaded, what is refused and why,
    what failed, what was not run."""
    wanted = [*wanted]
    found = [rows[key] for key in wanted if key in rows]
    tried = [row for row in found if row.reached != "refused"]
    lines = [*_overview(rows, wanted), "", "Row by row:", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(str, tried)]
    loads = [row.load for row in tried if row.load is not None]
    if loads:
        lines += ["", f"Speeds were taken at {min(loads):.1f} to {max(loads):.1f} busy processes for every core."]
    apart = {  # by what is said of them
        "Refused, in this sentence": [row for row in found if row.reached == "refused"],
        "Not as it should be": [row for row in tried if row.why],
    }
    for title, of in apart.items():
        said = dict[tuple[str, str], dict[str, list[str]]]()
        for row in of:
            where = "" if row.kept is None else row.format
            said.setdefault((where, row.why), {}).setdefault(row.family, []).append(row.structure)
        if said:
            lines += ["", f"{title}:", ""]
        for (where, why), families in said.items():
            lines.append(f"- {f'`{where}`, ' if where else ''}{_listed(families)}: {why}")
    missing = dict[str, dict[str, list[str]]]()
    for family, structure, format_ in wanted:
        if (family, structure, format_) not in rows:
            missing.setdefault(format_, {}).setdefault(family, []).append(structure)
    if missing:
        lines += ["", "Not run:", ""]
        lines += [f"- `{format_}`, {_listed(families)}" for format_, families in missing.items()]
    return "\n".join(lines)


def _overview(rows: Mapping[tuple[str, str, str], Row], wanted: Sequence[tuple[str, str, str]]) -> list[str]:
    """By family and format: with which structures a result was loaded by the engine, and answered the same."""
    formats = [*dict.fromkeys(format_ for _, _, format_ in wanted)]
    lines = [f"| family | {' | '.join(formats)} |", "|---" * (1 + len(formats)) + "|"]
    for family in sorted({family for family, _, _ in wanted}):
        cells = list[str]()
        for format_ in formats:
            asked = [key for key in wanted if (key[0], key[2]) == (family, format_)]
            tried = [rows.get(key) for key in asked]
            good = [row is not None and row.reached == "loaded" and not row.why for row in tried]
            works, fails = ([key[1] for key, yes in zip(asked, good, strict=True) if yes is of] for of in (True, False))
            if len(fails) < len(works):
                cells.append(f"all but {'; '.join(fails)}" if fails else "all")
            else:
                cells.append("; ".join(works) or ("none" if asked else ""))
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return lines


def _listed(families: Mapping[str, Sequence[str]]) -> str:
    """Families, with what it is of: those of the same structures together."""
    alike = dict[tuple[str, ...], list[str]]()
    for family, structures in families.items():
        alike.setdefault(tuple(dict.fromkeys(structures)), []).append(family)
    return "; ".join(f"{', '.join(names)} ({'; '.join(of)})" for of, names in alike.items())


def put(text: str, document: Path) -> None:
    """Replace what is between the two marks of a document.

    Raises:
        WrongInput: it does not have both of them once.
    """
    whole = document.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise WrongInput(f"{document} does not have {BEGIN} and then {END} once each; put them where tables belong")
    before, after = whole.partition(BEGIN)[0], whole.partition(END)[2]
    write_bytes(document, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())


def main(
    families: Annotated[str, typer.Option(help="by comma; all that are registered, if none is named")] = "",
    formats: Annotated[str, typer.Option(help="by comma; all of prunekit itself, if none is named")] = "",
    structure: Annotated[list[str] | None, typer.Option(help="repeatable; all, if none is named")] = None,
    rounds: Annotated[int, typer.Option(help="in which speeds are taken, at least 6; 0: none")] = 7,
    rows: Annotated[Path | None, typer.Option(help="file of rows, to which new ones are added")] = None,
    docs: Annotated[Path | None, typer.Option(help="document in which tables of all rows are put, too")] = None,
    run: Annotated[bool, typer.Option(help="whether rows that are not there are run")] = True,
) -> None:
    """Try what is not in the file of rows, and print the tables."""
    torch.set_num_threads(1)
    classes.register()
    ours = sorted(
        (name for name, entry in EXPORTERS.items() if entry.owner == "prunekit"), key=lambda name: name != "hf"
    )
    chosen = [*jobs(
        families.split(",") if families else [*ADAPTERS], structure or [*STRUCTURES],
        formats.split(",") if formats else ours,
    )]  # fmt: skip
    found = {} if rows is None else read(rows)
    for key in chosen if run else ():
        if key in found:
            continue
        found[key] = row = row_of(*key, rounds)
        if rows is not None:
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        typer.echo(f"{row} {row.why}", err=True)
    if docs is None:
        typer.echo(tables(found, chosen))
    else:
        all_ = jobs([*ADAPTERS], [*STRUCTURES], ours)
        put(tables(found, sorted(all_, key=lambda key: (ours.index(key[2]), key[0]))), docs)


if __name__ == "__main__":
    typer.run(main)
