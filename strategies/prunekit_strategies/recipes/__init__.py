"""Recipes: a paper's system as parts by name, one YAML file each."""
