"""Widths: which directions of the residual stream stay."""
