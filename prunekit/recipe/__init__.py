"""Every choice that makes a pruned model."""
