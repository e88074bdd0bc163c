"""Proof that an exported directory is the model that was promised: load it elsewhere and compare.

Elsewhere is a fresh Python process without network that runs this file alone. It loads the directory
as a user would: with its bundled code, or after `import prunekit`, or with transformers only.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

TOLERANCE = 1e-4  # of a logit, computed in float32
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Verified:
    """What the fresh process found."""

    parameters: int  # tied ones counted once
    difference: float  # largest |Δ logit|
    model_class: str


def verify(
    directory: str | Path,
    probe_ids: Int64[Tensor, "windows length"],
    expected_logits: Float[Tensor, "windows length vocabulary"],
    expected_parameters: int,
    tolerance: float = TOLERANCE,
    *,
    blocks: int | None = None,
    trust_remote_code: bool = False,
) -> Verified:
    """Load `directory` in a fresh process; its logits on `probe_ids` must be within `tolerance` of the expected.

    It computes in the dtype of `expected_logits`. Take them from the model in float32, into which saved
    bfloat16 goes exactly: computing in bfloat16, the number of threads alone moves logits by 1/256.
    With `blocks`, what does not fit memory is opened by `prunekit.paging`, within as many bytes of blocks.
    Bundled code that is prunekit's own, byte for byte, runs; other code only with `trust_remote_code`.

    Raises:
        NotVerified: it does not load, the parameter count is not exact, or logits differ.
    """
    from safetensors.torch import save_file

    from prunekit.errors import NotVerified  # here, because the fresh process runs this file without prunekit
    from prunekit.system.ending import tidy_ending

    directory = Path(directory)
    with tidy_ending(), tempfile.TemporaryDirectory(prefix="prunekit-verify-") as scratch, _held_pipe() as pipe:
        probe = Path(scratch, "probe.safetensors")
        save_file({"ids": probe_ids.cpu().contiguous(), "logits": expected_logits.detach().cpu().contiguous()}, probe)
        # -P: the folder of this file is no place to import from; modules of remote code go to the scratch folder
        trusted = "trusted" if trust_remote_code or _is_ours(directory) else ""
        how = ["" if blocks is None else str(blocks), trusted]
        child = subprocess.run(
            [sys.executable, "-P", __file__, str(directory.resolve()), str(probe), *how],
            env=os.environ | OFFLINE | {"HF_MODULES_CACHE": str(Path(scratch, "modules"))},
            cwd=scratch,
            stdin=pipe,
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode:
        raise NotVerified(f"{directory} does not load in a fresh process:\n{child.stderr[-4000:].strip()}")
    found = Verified(**json.loads(child.stdout.splitlines()[-1]))
    if found.parameters != expected_parameters:
        raise NotVerified(f"{directory} has {found.parameters:,} parameters, not {expected_parameters:,}")
    if not found.difference <= tolerance:  # NaN is not within any tolerance
        raise NotVerified(f"logits of {directory} differ by {found.difference:.3g}; {tolerance:.3g} is allowed")
    return found


@contextmanager
def _held_pipe() -> Iterator[int]:
    """A pipe to read from that ends when this process does, however it does."""
    read, write = os.pipe()
    try:
        yield read
    finally:
        os.close(read)
        os.close(write)


def _end_with_parent(scratch: Path) -> None:
    """Wait until the process that asked is gone; then nobody wants the answer, nor tidies up."""
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written; a buffer would be locked when this process ends
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def _is_ours(directory: Path) -> bool:
    """Whether the code that a directory loads with is a copy of our model classes, and there is no other."""
    from prunekit.models import classes

    try:
        named = json.loads((directory / "config.json").read_text(encoding="utf-8"))["auto_map"].values()
        code = (directory / f"{classes.BUNDLED}.py").read_bytes()
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return False
    return (
        all(str(name).startswith(f"{classes.BUNDLED}.") for name in named)
        and code == Path(classes.__file__).read_bytes()
        and len([*directory.rglob("*.py")]) == 1
        and not (directory / "custom_generate").exists()
    )


def _compare(directory: Path, probe: Path, blocks: str = "", trusted: str = "") -> Verified:
    """Load and compare, in this process."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = json.loads((directory / "config.json").read_text())
    if config["model_type"].startswith("prunekit_") and not trusted:
        importlib.import_module("prunekit")  # as a user would: it registers the model type
    trust: dict[str, Any] = {"trust_remote_code": bool(trusted)}
    if not blocks:
        how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        found: Any = AutoModelForCausalLM.from_pretrained(directory, **how, **trust)
        model = found[0].eval()
        if strange := sorted({*found[1]["missing_keys"], *found[1]["unexpected_keys"]}):
            raise SystemExit(f"the checkpoint and its model do not agree in {', '.join(strange)}")
    else:
        from prunekit.models.paging import opened

        float32, cpu = torch.float32, torch.device("cpu")
        model, _ = opened(str(directory), lambda _: float32, [cpu], int(blocks), **trust)
    tensors = load_file(probe)
    expected = tensors["logits"].double()
    with torch.no_grad():
        logits = model(tensors["ids"], use_cache=False).logits.double()
    if logits.shape != expected.shape:
        raise SystemExit(f"logits have shape {tuple(logits.shape)}, not {tuple(expected.shape)}")
    return Verified(
        parameters=sum(p.numel() for p in model.parameters()),
        difference=float((logits - expected).abs().max()),
        model_class=type(model).__name__,
    )


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, args=[Path(sys.argv[2]).parent], daemon=True).start()
    print(json.dumps(asdict(_compare(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))))
