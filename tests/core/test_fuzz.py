"""Files that anyone may have changed, through the command line: one sentence and exit code 2, or success.

Of damaged state also exit code 1. Never a traceback, never more than 10 seconds or 500 MB.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from prunekit.cli.main import app
from prunekit.errors import CannotGoOn
from prunekit.recipe.schema import Recipe
from prunekit.run import family

SECONDS, KILOBYTES = 10, 500_000
RECIPE: dict[str, Any] = {
    "pruner": "magnitude",
    "allocator": "uniform",
    "objective": "expected-error",
    "data": {"dataset": "python-docs", "seqlen": 16}
    | dict.fromkeys(("calibration_tokens", "search_tokens", "evaluation_tokens"), 64),
    "verify": False,
    "device": "cpu",
}
CONFIG = [
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("rope_scaling", "model_type", "architectures", "dtype", "torch_dtype", "attention_bias", "mlp_bias"),
    *("attention_dropout", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("initializer_range", "pretraining_tp", "use_cache", "transformers_version", "layer_types", "sliding_window"),
    *("id2label", "num_labels", "output_attentions", "output_hidden_states", "return_dict", "auto_map", "is_decoder"),
    *("is_encoder_decoder", "chunk_size_feed_forward", "per_layer_config", "attn_implementation", "pruned_heads"),
]

numbers = st.one_of(st.integers(-2, 70), st.sampled_from([10**5, 10**9, 2**31, 2**63, -(2**63), 10**30]), st.floats())
words = st.one_of(st.text(max_size=8), st.sampled_from(["obs", "groups", "2:4", "auto", "default", "latency=0.5"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(words, st.sampled_from(["name", "rope_type", "factor", "0"])), inner, max_size=3),
    ),
    max_leaves=6,
)
broken = st.one_of(
    st.binary(min_size=6, max_size=60), st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"\xef\xbb\xbf[1]"])
)


def changes(keys: list[str]) -> st.SearchStrategy[Any]:
    """Other values for some keys, or another file altogether."""
    return st.one_of(st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=2), broken)


def written(base: dict[str, Any], change: Any) -> bytes:
    """The file: JSON, which is YAML too."""
    if isinstance(change, bytes):
        return change
    return json.dumps(base | change).encode()


def run(model: Path, place: Path, codes: tuple[int, ...] = (0, 2), sparsity: str = "0.5") -> None:
    """Prune; the end is one of these exit codes, in words, in time."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recipe = ["--recipe", str(place / "recipe.yaml"), "--sparsity", sparsity]
    with warnings.catch_warnings(action="ignore"):
        done = CliRunner().invoke(app, ["prune", str(model), *recipe, "--output", str(place / "out"), "--quiet"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in codes, done.output
    assert not done.exit_code or done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert time.process_time() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES


def emptied(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return place


EXAMPLES = pytest.mark.parametrize("examples", [pytest.param(6, id="some"), pytest.param(700, marks=pytest.mark.slow)])


def repeated(test: Callable[[Any], None], strategy: st.SearchStrategy[Any], examples: int) -> None:
    quiet = settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )
    quiet(given(strategy)(test))()


@EXAMPLES
def test_any_config(examples: int, saved_letters: Callable[..., Path], tmp_path: Path) -> None:
    model = saved_letters()
    base = json.loads((model / "config.json").read_text())

    def holds(change: Any) -> None:
        place = emptied(tmp_path / "place")
        (model / "config.json").write_bytes(written(base, change))
        run(model, place)

    repeated(holds, changes(CONFIG), examples)


@EXAMPLES
def test_any_recipe(examples: int, saved_letters: Callable[..., Path], tmp_path: Path) -> None:
    model = saved_letters()
    keys = [key for key in Recipe.model_fields if key not in ("trust_remote_code", "verify", "engine")]

    def holds(change: Any) -> None:
        place = emptied(tmp_path / "place")
        if isinstance(change, dict) and isinstance(change.get("data"), dict):  # its defaults take minutes
            change = change | {"data": RECIPE["data"] | change["data"]}
        (place / "recipe.yaml").write_bytes(written(RECIPE, change))
        run(model, place)

    repeated(holds, changes(keys), examples)


@EXAMPLES
def test_any_state(
    examples: int, saved_letters: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stopped = saved_letters(), emptied(tmp_path / "stopped")

    def stop(folder: Path, output: Path, *, overwrite: bool) -> None:
        raise CannotGoOn("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(family, "publish", stop)
        run(model, stopped, codes=(1,), sparsity="0.3,0.5")
    left = stopped / "out.partial"
    files = sorted(str(f.relative_to(left)) for f in left.rglob("*") if f.suffix in (".json", ".jsonl"))
    assert {"run.json", "0.3/ledger.jsonl", "result/0.3/report.json"} <= {*files}
    assert any(file.endswith("manifest.json") for file in files)

    def holds(change: tuple[str, Any]) -> None:
        file, made = change
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(stopped, place)
        path = place / "out.partial" / file
        old = path.read_bytes()
        path.write_bytes(made if isinstance(made, bytes) else mutated(old, made))
        run(model, place, codes=(0, 1, 2), sparsity="0.3,0.5")

    change = st.one_of(broken, st.floats(0, 1), values.map(lambda value: {"value": value}))
    repeated(holds, st.tuples(st.sampled_from(files), change), examples)


def mutated(old: bytes, change: Any) -> bytes:
    """A file cut at a share of it, or with another value in the place of its first."""
    if isinstance(change, float):
        return old[: int(len(old) * change)]
    line, *rest = old.splitlines(keepends=True) if b"\n{" in old else [old]
    found = json.loads(line) if line else {}
    if isinstance(found, dict) and found:
        found[next(iter(found))] = change["value"]
    return json.dumps(found, default=str).encode() + b"\n" + b"".join(rest)
