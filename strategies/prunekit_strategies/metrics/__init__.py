"""Metrics: what a budget counts."""
