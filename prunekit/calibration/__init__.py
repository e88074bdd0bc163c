"""Tokens through the model, block by block, and what every site receives."""
