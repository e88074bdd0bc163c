"""GGUF, the format of llama.cpp: one file that its engines run, also where layers differ in size."""

from prunekit_strategies.exporters.gguf.exporter import GGUF

__all__ = ["GGUF"]
