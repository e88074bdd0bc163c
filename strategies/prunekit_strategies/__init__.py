"""Pruners, allocators, finishers and recipes that come with prunekit: one method, one file, one paper."""
