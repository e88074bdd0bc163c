"""Exporters: how a pruned model is written."""
