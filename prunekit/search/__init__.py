"""Candidates on disk, the supernet over them, and the conversation about allocations."""
