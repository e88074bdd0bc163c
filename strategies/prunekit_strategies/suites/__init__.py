"""Comparisons as they are shipped, as YAML."""
