"""Models: opened whole or block by block, cut, and of layers that differ in size."""
