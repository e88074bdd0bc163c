"""The demo: a small language model trained on the documentation of Python."""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
