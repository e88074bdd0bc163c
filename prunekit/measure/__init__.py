"""Measurements of a model: perplexity, speed, time."""
