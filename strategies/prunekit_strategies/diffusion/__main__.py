"""`python -m prunekit_strategies.diffusion PIPELINE --sparsity 0.2 --output DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Prune the U-Net of a pipeline from the command line.

    Args:
        arguments: of the command; None: those of the process.

    Returns:
        What the process exits with: 2 for what cannot be done, 1 for what went wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m prunekit_strategies.diffusion", description=__doc__)
    parser.add_argument("pipeline", metavar="PIPELINE", help="Folder of a pipeline that diffusers has saved.")
    parser.add_argument("--sparsity", type=float, required=True, help="Share of the U-Net's parameters to remove.")
    parser.add_argument("--output", "-o", required=True, help="Folder for the pruned pipeline.")
    parser.add_argument("--samples", type=int, default=32, help="Latents to generate for every question.")
    parser.add_argument("--steps", type=int, default=20, help="Steps of the pipeline's scheduler.")
    parser.add_argument("--guidance", type=float, help="Classifier-free guidance; 7.5 with a text encoder.")
    parser.add_argument("--prompts", type=Path, help="Text file with one prompt a line.")
    parser.add_argument("--size", type=int, help="Height and width of a latent.")
    parser.add_argument("--chunk", type=int, default=8, help="Samples that go through the U-Net together.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed; the same seed gives the same pipeline.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
    parser.add_argument("--dtype", default="auto", help="Number format of the computation.")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="No comparison in a fresh process.")
    parser.add_argument("--no-resume", dest="resume", action="store_false", help="No continuation of an earlier run.")
    parser.add_argument("--overwrite", action="store_true", help="Replacement of an earlier result in --output.")
    parser.add_argument("--quiet", "-q", action="store_true", help="No output except results and errors.")
    given = vars(parser.parse_args(arguments))

    from prunekit.errors import CannotGoOn, NotVerified, WrongInput, one_line
    from prunekit_strategies.diffusion.prune import prune_pipeline

    try:
        if (file := given.pop("prompts")) is not None:
            given["prompts"] = _lines(file)
        report = prune_pipeline(given.pop("pipeline"), given.pop("output"), **given)
    except (WrongInput, ImportError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (CannotGoOn, NotVerified) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    found = report["parameters"]
    print(f"parameters  {found['dense']:,} → {found['pruned']:,}; removed {found['sparsity']:.2%}")
    for operator in report["operators"]:
        if not operator["kept"]:
            print(f"removed     {operator['name']} ({operator['kind']}, {operator['parameters']:,} parameters)")
    return 0


def _lines(file: Path) -> list[str]:
    """The prompts of a file.

    Raises:
        WrongInput: it cannot be read.
    """
    from prunekit.errors import WrongInput, first_line

    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise WrongInput(f"the prompts {str(file)!r} cannot be read: {first_line(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
