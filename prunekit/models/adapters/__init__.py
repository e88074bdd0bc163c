"""Where the models of every family can be cut; one file per family."""
