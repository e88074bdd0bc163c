"""Objectives: how good an allocation is."""
