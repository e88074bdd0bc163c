"""Allocators: how much each site keeps."""
