"""A plan holds: over runs of different kind, peak memory and disk lie between half of the plan's figure and the figure.

Every run has a process of its own, which is told what to do by this very file.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

KINDS = {  # what is run, beside a search of few tokens
    "groups": {"allocator": "evolution", "allocator.generations": 2, "allocator.offspring": 8},
    "closed form": {"recipe": "fast"},
    "patterns": {"structure": "2:4", "pruner": "sparsegpt", "allocator": "uniform"},
    "paged": {"recipe": "fast", "memory": "1200MB"},
    "recovery": {"recipe": "fast", "pruner": "wanda", "finishers": ["least-squares"]},
    "statistics": {"recipe": "fast", "pruner": "wanda", "allocator": "uniform", "data.calibration_tokens": 512},
}


LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
"""60 million parameters in blocks, large against what libraries take."""
WIDE = {"hidden_size": 48, "intermediate_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 4}
"""One block with so many neurons that their second moments are most of what a run takes."""


def save_llama(path: Path, sizes: dict[str, int]) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prunekit.demo import MODEL

    torch.manual_seed(0)
    shared: dict[str, int] = {"num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**shared, **sizes)).to(torch.bfloat16).save_pretrained(path)  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("large") / "model", LARGE)


@pytest.mark.slow
def test_statistics_lie_between_half_of_the_plan_and_the_plan(tmp_path: Path) -> None:
    assert_holds("statistics", save_llama(tmp_path / "wide", WIDE), tmp_path / "out", ["memory"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "statistics"])
def test_peaks_lie_between_half_of_the_plan_and_the_plan(kind: str, large: Path, tmp_path: Path) -> None:
    assert_holds(kind, large, tmp_path / "out", ["memory", "disk"])


def assert_holds(kind: str, model: Path, output: Path, figures: Sequence[str]) -> None:
    command = [sys.executable, __file__, kind, str(model), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for what in figures:
        planned, taken = found[f"planned {what}"], found[what]
        assert planned / 2 <= taken <= planned, f"{what}: {taken / 1e6:,.0f} MB taken, {planned / 1e6:,.0f} planned"


def run(kind: str, model: str, output: Path) -> dict[str, float]:
    """Plan and prune; bytes planned, and bytes taken beyond what the process has before."""
    from prunekit.models.opening import skeleton
    from prunekit.recipe.resolve import resolve
    from prunekit.recipe.schema import Recipe
    from prunekit.run import prune, workplace
    from prunekit.run.session import Job, make_plan

    settings = dict(KINDS[kind])
    few = {"dataset": "python-docs", "seqlen": 128, "calibration_tokens": 4096, "search_tokens": 2048}
    data = {f"data.{key}": value for key, value in (few | {"evaluation_tokens": 2048}).items()}
    recipe = Recipe.load(str(settings.pop("recipe", "default"))).with_overrides({"model": model, **data, **settings})
    plan = make_plan(resolve(recipe), *skeleton(model), output, rehearse=True)
    written = [0]

    def publish(folder: Path, target: Path, **how: bool) -> None:
        written[0] = sum(file.stat().st_size for file in folder.parent.rglob("*") if file.is_file())
        workplace.publish(folder, target, **how)

    prune.publish = publish
    before = peak()
    prune.prune(recipe, Job(output=output))
    return {
        "planned memory": max(stage.memory + stage.shared for stage in plan.stages),
        "planned disk": plan.disk,
        "memory": peak() - before,
        "disk": written[0],
    }


def peak() -> int:
    """Bytes of this process in memory at most, so far; where /proc does not say, its parent's may be among them."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
