"""What can be removed, how much of it is kept, and what that costs: integers, no tensors."""
