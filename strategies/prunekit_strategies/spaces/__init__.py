"""Spaces for `prunekit tune`: what may be chosen, one YAML file each."""
