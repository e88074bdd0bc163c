"""vLLM: the folder that transformers loads, as vLLM serves it, also where layers differ in size."""

from prunekit_strategies.exporters.vllm.exporter import VLLM

__all__ = ["VLLM"]
