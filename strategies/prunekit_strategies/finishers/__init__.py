"""Finishers: polish the small model."""
