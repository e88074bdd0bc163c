"""An exporter for prunekit: the pruned model in one more format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.Exporter):
    """All tensors of the model in one file of safetensors, for programs that have classes of their own.

    Say here what reads the format, and where it is described.
    """

    half: bool = False  # rounded to float16

    @property
    def place(self) -> str:
        """The name of the file in the folder of a result."""
        return "template.safetensors"

    def write(self, product: pk.Product, path: Path) -> None:
        """Write the model: your format goes here."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in product.model.named_parameters()}
        if self.half:
            tensors = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
        with path.open("xb") as file:  # never over another model
            file.write(save(tensors))

    def verify(self, path: Path, probe: pk.Probe) -> None:
        """Prove that the file holds what was promised. Where a program can run the format, compare `probe.logits`."""
        try:
            tensors = load_file(path).values()
        except (OSError, SafetensorError) as error:
            raise pk.NotVerified(f"{path} cannot be loaded: {error}") from error
        if (found := sum(tensor.numel() for tensor in tensors)) != probe.parameters:
            raise pk.NotVerified(f"{path} has {found:,} parameters, not {probe.parameters:,}")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise pk.NotVerified(f"{path} holds values that are not finite")

    def size(self, order: pk.Order) -> int:
        """Bytes of the file, for plans."""
        return order.parameters * (2 if self.half else order.bytes_per_parameter)
