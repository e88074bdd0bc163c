"""Steps that a GPU replays: hundreds of small kernels become one launch.

A step that is repeated many times, say the removal of a few neurons, is a function without arguments and results on
tensors that stay where they are. On a CPU it is called. On CUDA its second call is captured as one graph, and this and
all later ones replay the graph: same kernels, same bits, and no work for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Protocol

import torch

from prunekit.errors import first_line
from prunekit.system.progress import warn_once

Step = Callable[[], object]


class Graph(Protocol):
    """What a step was captured as."""

    def replay(self) -> None: ...


class Replayed:
    """A step that may be replayed.

        step = Replayed(lambda: total.add_(change), total.device)
        for _ in range(100):
            step()

    What it reads and changes are tensors that are there before its first call and behind its last one, always the same
    ones. It hands nothing out but through them, asks no tensor for its value (`item`, `bool`, `nonzero`), and does the
    same every time: what Python computes in it, indices and shapes say, stays as it was when it was captured.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        """`device`: that its tensors are on."""
        self._step, self._device, self._calls = step, device, 0
        self._capture = CAPTURES.get(device.type)
        self._graph: Graph | None = None

    def __call__(self) -> None:
        """Do it once more."""
        self._calls += 1
        if self._capture is not None and self._calls == 2:  # by the first call, libraries have what they load
            try:
                self._graph = self._capture(self._step, self._device)
            except RuntimeError as error:  # nothing was computed: a capture only writes down
                self._capture = None
                warn_once(f"steps are launched kernel by kernel, which is slow: no graph of them ({first_line(error)})")
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()


def cuda_graph(step: Step, device: torch.device) -> Graph:
    """Capture a step on a CUDA device; nothing is computed.

    Raises:
        RuntimeError: it does what cannot be captured, or there is no memory for it.
    """
    graph = torch.cuda.CUDAGraph()
    # torch allows one capture in a process at a time, and has one stream for all of them, on the device of the first:
    # what is launched on another device would run, and not be captured. Other threads go on meanwhile: they read blocks
    # of a paged model, or work on other layers.
    with _CAPTURING, torch.cuda.device(device):
        own = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
            step()
    return graph


_CAPTURING = Lock()
CAPTURES: dict[str, Callable[[Step, torch.device], Graph]] = {"cuda": cuda_graph}  # by type of device
