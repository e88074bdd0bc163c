"""What a run will take, before any work."""
