"""Memory, files and progress."""
