"""Local pruners: what to keep in one layer."""
