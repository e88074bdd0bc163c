"""Stands for `prunekit.run.worker` where nothing is made: opens no model, and does with a cell what its name says.

`NAME PASS RECIPE [dies | breaks]`: the calibration pass that it reads and the digest of its recipe, and what becomes of
who makes it. On model `with 1` the first worker waits until there is a second one, on `no 1` and `refused by 1` until
that one has failed. It imports no prunekit, so that it starts at once.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def tell(**message):
    print(json.dumps(message), flush=True)


def row_of(told, key, **values):
    cell, sparsity, seed, share = key
    return {
        "model": told["model"], "cell": cell, "sparsity": sparsity, "seed": seed, "share": share, "losses": [1.0],
        "trace": [], "perplexity": 20.0, "seconds": 2.0, "wall": 0.1, **values,
    }  # fmt: skip


def wait_for(folder, gone):
    """Until another worker is there, or is there no more."""
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        time.sleep(0.01)
    while gone:
        try:
            os.kill(int((folder / "pid").read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)


def named(cell):
    return [*cell.split()[1:], cell, cell][: max(2, len(cell.split()) - 1)]


told = json.loads(sys.stdin.readline())
cells = [cell["name"] for cell in told["cells"]]
sparsities, seeds = told["suite"]["sparsity"], range(told["suite"]["seeds"])
number = int(told["folder"].rsplit("-", 1)[1])
(Path(told["folder"]) / "pid").write_text(str(os.getpid()))
if f"no {number}" in told["model"]:
    print("it does not fit", file=sys.stderr)
    raise SystemExit(1)
coming = [
    [cell, sparsity, seed, share, f"{named(cell)[1]} {sparsity} {seed}", f"{named(cell)[0]} {sparsity} {share}"]
    for share in told["shares"] for cell in cells for sparsity in sparsities for seed in seeds
]  # fmt: skip
if told["model"] == f"refused by {number}":
    tell(error="WrongInput", text="there is no text in it; give another")
    raise SystemExit(1)
tell(say="the model is open")
tell(
    opened={"dtype": "float32"},
    dense=told["dense"] or row_of(told, ("dense", 0.0, 0, 1.0), recipe="weights and text"),
    coming=coming if told["first"] else [],
)
for line in sys.stdin:
    key = json.loads(line)["make"]
    cell = key[0]
    reads, recipe, *what = named(cell)
    tell(part=cell)
    tell(describe={"pid": os.getpid(), "worker": number, "threads": os.environ["OMP_NUM_THREADS"]})
    if "dies" in what:
        os.kill(os.getpid(), signal.SIGKILL)
    if "breaks" in what:
        tell(error="OSError", errno=28, text="No space left on device", filename=None)
        print("no space", file=sys.stderr)
        raise SystemExit(1)
    if number == 0 and told["model"] in ("with 1", "no 1", "refused by 1"):
        wait_for(Path(told["folder"]).with_name("worker-1"), gone=told["model"] != "with 1")
    tell(measured={"loss": 1.0}, step=8)
    tell(part=None, done=True)
    tell(row=row_of(told, key, recipe=f"{recipe} {key[1]} {key[2]}", passes={f"{reads} {key[1]} {key[3]}": 1.0}))
