"""Signals: one number per site, for allocators to decide by."""
