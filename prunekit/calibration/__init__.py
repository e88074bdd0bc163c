"""From text to moments: tokens, streams through the blocks, what each site receives."""
