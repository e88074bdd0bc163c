"""A page is one file that asks nobody for anything, and whatever a folder says, no word of it becomes markup."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunekit import WrongInput
from prunekit.recipe.suite import Suite
from prunekit.report.comparison import DENSE, FAILED, Comparison, Row, Rows
from prunekit.report.notebook import show_family, show_result
from prunekit.report.page import add_page, write_page
from prunekit.report.page.paces import beyond_noise
from prunekit.report.page.sizes import marked
from prunekit.report.page.study import listed_recipes
from prunekit.system.files import write_state

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


def result(folder: Path, **changes: Any) -> Path:
    """The files of a result that a page reads."""
    folder.mkdir()
    one = {"groups": 4, "parameters": 8, "error": 0.1}
    sites = [
        {"name": f"model.layers.{b}.{part}", "block": b, "kind": kind, "kept": 2 + b, **one}
        for b in range(2) for part, kind in (("self_attn.o_proj", "attention"), ("mlp.down_proj", "mlp"))
    ]  # fmt: skip
    measured = {"perplexity": 10.0, "nll": 2.3, "label": "ppl/text/seq8/n4/float32"}
    text = {"source": "text", "tokens": 64, "seqlen": 8, "sha256": "ab" * 32}
    report = {
        "model": "somebody/model", "dense": {"parameters": 100, "block_parameters": 80},
        "pruned": {"parameters": 60, "block_parameters": 40, "sparsity_of_blocks": 0.5, "sparsity_of_model": 0.4},
        "losses": {"dense": measured, "pruned": measured | {"perplexity": 12.0}},
        "sites": sites, "data": {"source": "text", "calibration": text},
        "search": {"questions": 2, "token_forwards": 128},
        "seconds": {"prune": 3.0, "search": 1.0}, "versions": {"prunekit": "1"},
    } | changes  # fmt: skip
    names = [site["name"] for site in sites]
    ledger = [
        {"kind": "space", "walk": 0, "sites": names, "ladders": [[0, 2, 4]] * 4, "errors": [[1.0, 0.2, 0.0]] * 4},
        {"kind": "question", "allocation": [2] * 4, "tokens": 64, "loss": 0.5},
        {"kind": "question", "allocation": [3] * 4, "tokens": 64, "loss": 0.4},
        {"kind": "question", "allocation": [1] * 4, "tokens": 64, "loss": None},
    ]
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ledger))
    (folder / "recipe.yaml").write_text("version: 1\n")
    return folder


def comparison(folder: Path, evil: str = "", *, speed: bool = False) -> Path:
    """The files of a comparison; with `speed` all cells but `twin` at a quarter were timed, decode within noise."""
    folder.mkdir()
    suite = Suite.of_mapping({"recipes": ["fast"], "models": ["m"], "sparsity": [0.25, 0.5]})
    write_state(folder / "run.json", {"identity": {"suite": suite.model_dump(mode="json")}})
    rows, rng = Rows(folder / "rows.jsonl"), np.random.default_rng(0)
    base = rng.normal(3, 1, 16)

    def row(cell: str, sparsity: float, seed: int, above: float) -> Row:
        losses = base + above + 0.01 * rng.normal(size=16)
        fast: dict[str, Any] = {}
        if speed and cell == DENSE:
            fast = {"prefill_tokens_per_second": 1000.0, "decode_tokens_per_second": 10.0}
        elif speed and (cell, sparsity) != ("twin", 0.25):
            times = 1 / (1 - 0.6 * sparsity + 0.1 * (cell == "uniform"))
            fast = {
                "prefill_ratio": times,
                "prefill_ratio_interval": (0.98 * times, 1.02 * times),
                "decode_ratio": 1.01,
                "decode_ratio_interval": (0.97, 1.05),
                "timed": "2 × 8 tokens read",
            }
        return Row(
            "m", cell, sparsity, seed, losses=tuple(losses), perplexity=float(np.exp(losses.mean())), label="ppl/t",
            seconds=2.0 + above, wall=1.0, parameters=50, removed=sparsity, token_forwards=64, trace=((32, 0.5),),
            questions=1 if cell == "uniform" else 4, stages={"prune": 1.5, "search": 0.5 + above}, **fast,
        )  # fmt: skip

    rows.add(row(DENSE, 0.0, 0, 0.0))
    for sparsity in (0.25, 0.5):
        for seed in (0, 1):
            for cell, above in (("uniform", 0.3), (f"ours{evil}", 0.1), ("twin", 0.1)):
                rows.add(row(cell, sparsity, seed, above))
    rows.add(Row("m", "broken", 0.5, 0, state=FAILED, reason=f"RuntimeError: {evil or 'memory'}"))
    return folder


def family(folder: Path, evil: str = "", metric: str = "parameters") -> Path:
    """The files of a family of three, of which the second is not on the front."""
    folder.mkdir()
    members = [
        {"folder": f"{sparsity}{evil}", "sparsity": sparsity, "realised": sparsity + 0.02, "parameters": parameters,
         "perplexity": perplexity, "front": perplexity != 20.0}
        for sparsity, parameters, perplexity in ((0.3, 80, 12.0), (0.5, 60, 20.0), (0.55, 55, 14.0))
    ]  # fmt: skip
    document = {
        "model": f"somebody/model{evil}", "metric": metric, "of": "blocks", "label": "ppl/text",
        "dense": {"parameters": 100, "perplexity": 10.0}, "members": members,
    }  # fmt: skip
    (folder / "pareto.json").write_text(json.dumps(document))
    return folder


def grid(folder: Path, objectives: tuple[str, ...] = ()) -> Path:
    """The files of a comparison of four pruners with six allocators, of which one cell has no result."""
    folder.mkdir()
    pruners, allocators = ["p0", "p1", "p2", "p3"], ["a0", "a1", "a2", "a3", "a4", "a5"]
    asked = {"models": ["m"], "pruners": pruners, "allocators": allocators, "objectives": list(objectives)}
    suite = Suite.of_mapping(asked)
    write_state(folder / "run.json", {"identity": {"suite": suite.model_dump(mode="json")}})
    rows, base = Rows(folder / "rows.jsonl"), np.random.default_rng(0).normal(3, 1, 8)
    rows.add(Row("m", DENSE, 0.0, 0, losses=tuple(base), perplexity=float(np.exp(base.mean())), label="ppl/t"))
    for i, pruner in enumerate(pruners):
        for j, allocator in enumerate(allocators):
            for o, objective in enumerate(objectives or ("",)):
                cell = " + ".join(filter(None, (pruner, allocator, objective)))
                if cell == "p3 + a5":
                    rows.add(Row("m", cell, 0.5, 0, state=FAILED, reason="RuntimeError: memory"))
                    continue
                noise = np.random.default_rng((i, j // 2, o)).normal(size=8)  # a0 and a1 are alike, and so on
                losses = base + 0.1 + 0.2 * (3 - i) + 0.1 * (j // 2) + 0.3 * o + 0.01 * noise
                perplexity = float(np.exp(losses.mean()))
                rows.add(
                    Row("m", cell, 0.5, 0, losses=tuple(losses), perplexity=perplexity, label="ppl/t", seconds=1.0)
                )
    return folder


def charts_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def rows_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What is drawn, of several layers the first one's."""
    return spec["data"]["values"] if "data" in spec else rows_of(spec["layer"][0])


def test_a_grid_begins_with_a_picture_of_it_and_ends_with_the_long_table(tmp_path: Path) -> None:
    text = write_page([grid(tmp_path / "g")], tmp_path / "page.html").read_text()
    assert (
        text.index('id="run-0-0-grid-0"') < text.index('id="run-0-0-intervals"') < text.index("Leaderboard</caption>")
    )
    charts = charts_of(text)
    tiles = charts["run-0-0-grid-0"]["data"]["values"]
    assert len(tiles) == 24
    assert [tile["row"] for tile in tiles[::6]] == ["p3", "p2", "p1", "p0"]  # by their medians
    marks = {tile["cell"]: tile["mark"] for tile in tiles}
    assert {cell for cell, mark in marks.items() if mark in ("1", "=")} == {"p3 + a0", "p3 + a1"}
    assert marks["p3 + a5"] == "×"
    assert "The best of 23 is p3 + a0" in text
    assert "1 is not separated from it" in text
    assert len(charts["run-0-0-intervals"]["layer"][1]["encoding"]["y"]["scale"]["domain"]) == 20
    assert "the first 20 of 23" in text
    assert 'data-first="20"' in text


def test_a_grid_of_three_sides_has_a_picture_for_each_of_the_shortest_and_a_small_one_has_none(tmp_path: Path) -> None:
    charts = charts_of(write_page([grid(tmp_path / "g", ("o0", "o1"))], tmp_path / "page.html").read_text())
    assert {name for name in charts if "grid" in name} == {"run-0-0-grid-0", "run-0-0-grid-1"}
    scales = [charts[f"run-0-0-grid-{i}"]["layer"][0]["encoding"]["color"]["scale"]["domain"] for i in range(2)]
    assert scales[0] == scales[1]  # the same colour means the same
    text = write_page([comparison(tmp_path / "c")], tmp_path / "small.html").read_text()
    assert not [name for name in charts_of(text) if "grid" in name]
    assert text.index("Leaderboard</caption>") < text.index('id="run-0-0-intervals"')  # short, so it comes first


class Tags(HTMLParser):
    """The tags of a page, and what is asked of others."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids, self.outward = list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "action") or (name == "href" and not value.startswith("#")):
                self.outward.append(value)


def test_a_page_is_one_file_without_requests_under_three_megabytes(tmp_path: Path) -> None:
    folders = [result(tmp_path / "a"), result(tmp_path / "b"), comparison(tmp_path / "c")]
    text = write_page(folders, tmp_path / "page.html").read_text()
    assert len(text) < 3_000_000
    found = Tags(text)
    assert found.outward == []
    assert len(set(found.ids)) == len(found.ids)
    assert found.tags.count("h1") == 1
    assert found.tags.count("h2") == found.tags.count("section") >= 10
    assert "default-src 'none'" in text
    charts = json.loads(text.split('<script type="application/json" id="charts">')[1].split("</script>")[0])
    assert set(charts) < set(found.ids)
    assert all(spec["description"] for spec in charts.values())


@pytest.mark.parametrize("kind", ["result", "study", "comparison", "family"])
def test_no_word_of_a_folder_becomes_markup(tmp_path: Path, kind: str) -> None:
    plain, odd = tmp_path / "plain.html", tmp_path / "odd.html"
    if kind == "result":
        samples = [{"prompt": EVIL, "dense": {"text": EVIL}, "pruned": {"text": EVIL}}]
        same = [{"prompt": "a", "dense": {"text": "b"}, "pruned": {"text": "c"}}]
        evil = result(tmp_path / "evil", model=f"x/{EVIL}", versions={EVIL: EVIL}, samples=samples)
        (evil / "recipe.yaml").write_text(EVIL)
        write_page([result(tmp_path / "good", samples=same)], plain)
    elif kind == "study":
        evil = study(tmp_path / "evil", EVIL)
        write_page([study(tmp_path / "good")], plain)
    elif kind == "family":
        evil = family(tmp_path / "evil", EVIL.replace("/", ""), metric=EVIL)
        write_page([family(tmp_path / "good", metric="flops")], plain)
    else:
        evil = comparison(tmp_path / "evil", EVIL)
        write_page([comparison(tmp_path / "good", "o" * len(EVIL))], plain)  # as wide
    write_page([evil], odd)
    assert Tags(odd.read_text()).tags == Tags(plain.read_text()).tags
    assert EVIL not in odd.read_text()


def test_what_a_page_says_of_a_comparison(tmp_path: Path) -> None:
    text = write_page([comparison(tmp_path / "c")], tmp_path / "page.html").read_text()
    places = re.findall(r"<tr><td>(=|\d+)</td><td>(\w+)</td>", text)
    assert {cell for _, cell in places[:2]} == {"ours", "twin"}
    assert [place for place, _ in places] == ["1", "=", "3"] * 2  # a tie is no second place
    assert "RuntimeError: memory" in text
    assert "Mean ranks" in text


def test_where_the_optimum_is_known_the_distance_to_it_is_said_and_elsewhere_nothing(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    assert "exact optimum" not in write_page([folder], tmp_path / "page.html").read_text()
    rows = Rows(folder / "rows.jsonl")
    for seed, reached in ((0, 2.2), (1, 2.0)):
        known = {"optimum": 2.0, "reached": reached, "known_by": "table", "perplexity": 9.0, "losses": (2.2,) * 16}
        rows.add(Row("m", "near", 0.5, seed, label="ppl/t", **known))  # type: ignore[arg-type]
    text = write_page([folder], tmp_path / "page.html").read_text()
    assert "<tr><td>near</td><td>2.1</td><td>2</td><td>5.00%</td><td>dynamic programming</td><td>2</td></tr>" in text
    assert "Predicted loss, not perplexity" in text


def test_folders_of_nothing_and_reports_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WrongInput, match="is no result, family, study or comparison"):
        write_page([tmp_path / "empty"], tmp_path / "page.html")
    odd = result(tmp_path / "odd", losses={})
    with pytest.raises(WrongInput, match="cannot read"):
        write_page([odd], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    said: list[str] = []
    add_page(odd, said.append)  # a result is not lost for its picture
    assert "no page was made" in said[0]


def test_losses_that_are_not_finite_are_shown_as_such(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    Rows(folder / "rows.jsonl").add(Row("m", "diverged", 0.5, 0, losses=(None,) * 16, label="ppl/t", seconds=1.0))  # type: ignore[arg-type]
    text = write_page([folder], tmp_path / "page.html").read_text()
    assert "<td>diverged</td><td>inf</td>" in text
    assert "NaN" not in text.split('id="charts">')[1].split("</script>")[0]


def study(folder: Path, evil: str = "", metrics: tuple[str, ...] = ("perplexity",)) -> Path:
    """The files of a study."""
    folder.mkdir()

    def row(name: str, value: float | None, reason: str = "", **overrides: Any) -> dict[str, Any]:
        values = {} if value is None else {metric: value / (i + 1) for i, metric in enumerate(metrics)}
        state = "pruned" if value is None else "complete"
        return {
            "name": name, "state": state, "values": values, "overrides": overrides, "reason": reason, "recipe": name,
        }  # fmt: skip

    rows = [
        row("base", 12.0),
        row("0", 11.0, damping=0.01, pruner={"name": f"obs{evil}", "aim": "own"}),
        row("1", None, f"no such {evil}", damping=1.0, pruner="none"),
        row("2", 10.5, damping=0.1, pruner={"name": "obs", "aim": "stream"}),
    ]
    document = {
        "schema": 1, "model": f"somebody/model{evil}", "sparsity": 0.5, "metrics": list(metrics), "front": ["2"],
        "rows": rows,
    }  # fmt: skip
    (folder / "trials.json").write_text(json.dumps(document))
    (folder / "best.yaml").write_text(f"version: 1\n# {evil}\n")
    return folder


def test_what_a_page_says_of_a_study(tmp_path: Path) -> None:
    text = write_page([study(tmp_path / "s")], tmp_path / "page.html").read_text()
    names = re.findall(r"<tr><td>(\w+)</td><td>(\*?)</td>", text)
    assert names == [("2", "*"), ("0", ""), ("base", ""), ("1", "")]  # the best first, what has no value last
    assert "damping 0.1, pruner obs (aim stream)" in text
    charts = json.loads(text.split('<script type="application/json" id="charts">')[1].split("</script>")[0])
    assert {"run-0-trials", "run-0-choice-0", "run-0-choice-1"} == set(charts)
    lowest = [row["lowest"] for row in charts["run-0-trials"]["data"]["values"]]
    assert lowest == [12.0, 11.0, 10.5]
    two = write_page([study(tmp_path / "t", metrics=("perplexity", "seconds"))], tmp_path / "two.html").read_text()
    assert '"run-0-front-0"' in two


def test_curves_are_of_all_groups_of_a_site_also_where_a_later_pass_has_a_part_of_them(tmp_path: Path) -> None:
    folder = result(tmp_path / "r")
    ledger = (folder / "ledger.jsonl").read_text()
    space = json.loads(ledger.splitlines()[0])
    later = space | {"walk": 1, "ladders": [[0, 1]] * 4, "errors": [[1.0, 0.5]] * 4}
    (folder / "ledger.jsonl").write_text(ledger + json.dumps(later) + "\n")
    rows = rows_of(charts_of(write_page([folder], tmp_path / "page.html").read_text())["run-0-errors"])
    assert [row["share"] for row in rows] == [0.0, 0.25] * 4  # one group of four at most
    assert {row["kind"] for row in rows} == {"attention", "MLP"}


def test_a_result_says_what_each_number_is_of_the_dense_one_and_its_time_where_that_was_the_budget(
    tmp_path: Path,
) -> None:
    times = {"realised": 0.5, "milliseconds": {"dense": 8.0, "pruned": 4.0}}
    folder = result(tmp_path / "r", budget={"metric": "latency"}, latency=times)
    text = write_page([folder], tmp_path / "page.html").read_text()
    assert "<tr><td>Parameters</td><td>100</td><td>60</td><td>60.0%</td></tr>" in text
    assert "<tr><td>Perplexity</td><td>10.00</td><td>12.00</td><td>120.0%</td></tr>" in text
    assert "<tr><td>Milliseconds</td><td>8.00</td><td>4.00</td><td>50.0%</td></tr>" in text
    shares = [[row["share"] for row in rows_of(charts_of(text)[f"run-0-layers-{i}"])] for i in range(2)]
    assert shares == [[0.5, 0.75]] * 2  # attention and MLP, block by block


def test_the_best_allocations_of_a_search_are_drawn_from_the_first_to_the_last_and_no_more_than_fit(
    tmp_path: Path,
) -> None:
    folder = result(tmp_path / "r")
    tiles = rows_of(charts_of(write_page([folder], tmp_path / "page.html").read_text())["run-0-tried"])
    assert [tile["share"] for tile in tiles] == [0.5] * 4 + [0.75] * 4  # the third question had no loss
    assert [tile["tokens"] for tile in tiles] == [64] * 4 + [128] * 4
    ledger = (folder / "ledger.jsonl").read_text()
    later = {"kind": "question", "allocation": [4] * 4, "tokens": 64, "loss": 0.9}
    (folder / "ledger.jsonl").write_text(ledger + ledger.splitlines()[0] + "\n" + json.dumps(later) + "\n")
    tiles = rows_of(charts_of(write_page([folder], tmp_path / "page.html").read_text())["run-0-tried"])
    assert [tile["share"] for tile in tiles][-4:] == [1.0] * 4  # the answer is of the last pass, whatever its losses
    asked = [{"kind": "question", "allocation": [1] * 4, "tokens": 64, "loss": 1 / (1 + i)} for i in range(1000)]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    tiles = rows_of(charts_of(write_page([folder], tmp_path / "page.html").read_text())["run-0-tried"])
    assert len(tiles) == 40 * 4
    assert (tiles[0]["step"], tiles[-1]["step"]) == (1, 1000)


def test_cells_that_ask_one_question_take_no_place_among_searches(tmp_path: Path) -> None:
    charts = charts_of(write_page([comparison(tmp_path / "c")], tmp_path / "page.html").read_text())
    rows = rows_of(charts["run-0-0-anytime"])
    assert {row["cell"] for row in rows} == {"ours", "twin"}
    assert [row["tokens"] for row in rows] == [32, 64] * 2  # what was asked after the last step lowered nothing


def test_a_comparison_over_sparsities_has_size_against_perplexity_stages_and_what_it_does_not_say(
    tmp_path: Path,
) -> None:
    text = write_page([comparison(tmp_path / "c")], tmp_path / "page.html").read_text()
    charts = charts_of(text)
    lines = rows_of(charts["run-0-sizes-0-chart"])
    assert [(row["cell"], row["kept"]) for row in lines[-2:]] == [
        ("uniform", 0.75),
        ("uniform", 0.5),
    ]  # after the dense
    assert "broken" not in {row["cell"] for row in lines}  # it has a result at neither
    spent = {(row["cell"], row["stage"]): row["seconds"] for row in rows_of(charts["run-0-0-stages"])}
    assert math.isclose(spent["ours", "search"], 0.6)
    assert "<tr><td>uniform</td><td>1.5</td><td>0.8</td></tr>" in text
    assert "ppl/t (16 windows)" in text
    assert "Seeds: 2" in text
    assert "Models: 1" in text
    assert "run-0-sizes-0" not in write_page([grid(tmp_path / "g")], tmp_path / "grid.html").read_text()  # one sparsity


def test_a_comparison_that_was_timed_has_time_against_perplexity_beyond_noise(tmp_path: Path) -> None:
    text = write_page([comparison(tmp_path / "c", speed=True)], tmp_path / "page.html").read_text()
    charts = charts_of(text)
    points = {point["name"]: point for point in rows_of(charts["run-0-paces-0-prefill"])}
    assert set(points) == {"dense"} | {f"{c}, {s}" for c in ("uniform", "ours", "twin") for s in ("25%", "50%")} - {
        "twin, 25%"
    }
    assert points["ours, 50%"]["time"] == pytest.approx(0.7)
    assert points["ours, 50%"]["low"] == pytest.approx(0.7 / 1.02)
    assert {name for name, point in points.items() if point["front"]} == {"dense", "ours, 50%"}
    decode = rows_of(charts["run-0-paces-0-decode"])
    assert {point["name"] for point in decode if point["front"]} == {"dense"}  # no cell is faster beyond noise
    assert {point["said"] for point in decode} == {"as it is", "no difference beyond noise"}
    assert "5 of 6 cells were timed." in text
    assert "Not timed: twin." in text
    assert text.count("<td>not timed</td>") == 2
    assert text.count("<td>no difference beyond noise</td>") == 5
    assert "How fast pruned models are was not measured" not in text
    plain = write_page([comparison(tmp_path / "d")], tmp_path / "plain.html").read_text()
    assert not [name for name in charts_of(plain) if "paces" in name]
    assert "How fast pruned models are was not measured" in plain


def test_what_noise_cannot_tell_apart_is_not_on_the_front_for_it() -> None:
    places = [(20.0, 0.50, 0.52), (21.0, 0.51, 0.53), (22.0, 0.40, 0.44), (22.0, 0.30, 0.34), (22.0, 0.33, 0.35)]
    points = [{"perplexity": y, "low": low, "high": high} for y, low, high in places]
    lost: dict[str, Any] = {"perplexity": None, "low": 0.1, "high": 0.2}
    assert [each["front"] for each in beyond_noise([*points, lost])] == [True, False, False, True, True, False]


def test_several_results_begin_with_size_and_time_against_perplexity(tmp_path: Path) -> None:
    measured = {"nll": 2.3, "label": "ppl/text/seq8/n4/float32"}
    folders = []
    for name, parameters, perplexity, pruned in (("a", 60, 12.0, 4.0), ("b", 70, 13.0, 5.0), ("c", 80, 11.0, 7.0)):
        counted = {"parameters": parameters, "block_parameters": 40, "sparsity_of_blocks": 0.5}
        losses = {"dense": measured | {"perplexity": 10.0}, "pruned": measured | {"perplexity": perplexity}}
        times = {"realised": pruned / 8, "milliseconds": {"dense": 8.0, "pruned": pruned}}
        told = {"pruned": counted, "losses": losses, "budget": {"metric": "latency"}, "latency": times}
        folders.append(result(tmp_path / name, **told))
    folders.append(result(tmp_path / "other", model="another/model"))
    text = write_page(folders, tmp_path / "page.html").read_text()
    assert text.index("model, 3 results") < text.index("model, 50% of the blocks removed")
    charts = charts_of(text)
    points = rows_of(charts["several-0-size"])
    assert {point["name"] for point in points if point["front"]} == {"dense", "a", "c"}
    times = {point["name"]: point["time"] for point in rows_of(charts["several-0-time"])}
    assert times == {"dense": 1.0, "a": 0.5, "b": 0.625, "c": 0.875}
    assert not [name for name in charts if name.startswith("several-1")]
    assert "several" not in "".join(charts_of(write_page(folders[:1], tmp_path / "one.html").read_text()))


def test_the_front_is_what_no_other_beats() -> None:
    rng = np.random.default_rng(0)
    points = [{"x": int(x), "perplexity": int(y)} for x, y in rng.integers(0, 6, (40, 2))]
    for each in marked(points, "x"):
        beaten = any(
            (o["x"] < each["x"] and o["perplexity"] <= each["perplexity"])
            or (o["x"] <= each["x"] and o["perplexity"] < each["perplexity"])
            for o in points
        )
        assert each["front"] is not beaten


def test_a_family_is_drawn_over_what_its_budget_counted(tmp_path: Path) -> None:
    plain = charts_of(write_page([family(tmp_path / "f")], tmp_path / "page.html").read_text())
    assert set(plain) == {"run-0-front"}
    timed = charts_of(write_page([family(tmp_path / "t", metric="latency")], tmp_path / "timed.html").read_text())
    assert list(timed) == ["run-0-spent", "run-0-front"]
    points = {each["name"]: each for each in rows_of(timed["run-0-spent"])}
    assert points["0.3"]["left"] == pytest.approx(0.68)
    assert points["dense"]["left"] == 1
    assert not points["0.5"]["front"]  # slower and worse than 0.55


def test_names_are_placed_beside_points_that_are_there_and_colours_are_those_of_every_theme(tmp_path: Path) -> None:
    import vl_convert

    text = write_page([comparison(tmp_path / "c"), family(tmp_path / "f")], tmp_path / "page.html").read_text()
    charts = charts_of(text)
    named = {name: spec for name, spec in charts.items() if "usermeta" in spec}
    assert set(named) == {"run-0-0-cost", "run-0-1-cost", "run-1-front"}
    compiled = vl_convert.vegalite_to_vega(charts["run-1-front"])
    assert "dots_marks" in {mark["name"] for mark in compiled["marks"]}
    used = set(re.findall(r"var\((--\w+)\)", json.dumps(charts)))
    assert len(used) > 3
    style = text[text.index("<style>") : text.index("</style>")]
    themes = re.findall(r":root[^{]*\{([^}]*)\}", style)
    assert len(themes) == 3  # light, dark, paper
    assert all(f"{name}:" in theme for name in used for theme in themes)


@pytest.mark.parametrize("shown", ["result", "family", "study", "comparison"])
def test_a_notebook_shows_tables_and_no_markup_of_the_folder(tmp_path: Path, shown: str) -> None:
    if shown == "result":
        report = json.loads((result(tmp_path / "r", model=EVIL) / "report.json").read_text())
        text = show_result(report, tmp_path / EVIL.replace("/", ""))
    elif shown == "family":
        member = {"folder": EVIL, "sparsity": 0.5, "parameters": 3, "perplexity": None, "front": True}
        text = show_family({"members": [member]}, None)
    elif shown == "study":
        document = json.loads((study(tmp_path / "s", EVIL) / "trials.json").read_text())
        text = listed_recipes(document["rows"], document["metrics"], {"2"})
    else:
        folder = comparison(tmp_path / "c", EVIL)
        suite = Suite.of_mapping({"recipes": ["fast"], "models": ["m"], "sparsity": [0.25, 0.5]})
        text = Comparison(suite, list(Rows(folder / "rows.jsonl")))._repr_html_()
    assert "<table" in text
    found = Tags(text)
    assert set(found.tags) <= {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "p", "img"}
    assert [each[:26] for each in found.outward] == ["data:image/svg+xml;base64,"] * (shown == "result")
