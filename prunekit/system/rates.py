"""How fast this machine is, measured in a second or two."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Rates:
    """Measured on this machine in a second or two."""

    flops: float  # of matrix products in the dtype of the computation, per second
    doubles: float  # of those in float64
    read: float  # bytes per second from the disk that holds the output
    write: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, folder: Path) -> Rates:
        """Time a square product, and a file written, dropped from the cache and read again.

        Args:
            device: of the products.
            dtype: of the computation; float64 is timed beside it.
            folder: on the disk that is timed.
        """
        flops, doubles = (_rate(torch.randn(1024, 1024, device=device).to(kind)) for kind in (dtype, torch.float64))
        block, count = os.urandom(1 << 20), 64
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".prunekit-") as file:
            started = time.perf_counter()
            for _ in range(count):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            write = count * len(block) / (time.perf_counter() - started)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(1 << 20):
                pass
            read = count * len(block) / (time.perf_counter() - started)
        return cls(flops, doubles, read, write)


def times_as_fast(dtype: torch.dtype, d_in: int, d_out: int, tokens: int = 256, turns: int = 8) -> float:
    """How many times as fast as in float32 this CPU sends tokens through a linear map when both are in `dtype`.

    In turns, on one thread and by its own clock, so that other programs count little.
    """
    x, weight = torch.ones(tokens, d_in), torch.ones(d_out, d_in)
    operands = {kind: (x.to(kind), weight.to(kind)) for kind in (torch.float32, dtype)}
    took, threads = dict.fromkeys(operands, 0.0), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(1 + turns):
            for kind, (left, right) in operands.items():
                started = time.thread_time()
                torch.nn.functional.linear(left, right)
                if turn:  # the first time pays for what later ones find ready
                    took[kind] += time.thread_time() - started
    finally:
        torch.set_num_threads(threads)
    return took[torch.float32] / max(took[dtype], 1e-9)


def _rate(a: torch.Tensor) -> float:
    """FLOP/s of products of a square matrix with itself, over half a second."""
    out = torch.mm(a, a)  # the first time pays for what later ones find ready
    wait_for(a.device)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.5:
        torch.mm(a, a, out=out)
        done += 2 * len(a) ** 3
        wait_for(a.device)
    return done / (time.perf_counter() - started)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
