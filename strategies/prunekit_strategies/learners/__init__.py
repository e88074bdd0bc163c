"""Learners: which groups stay, by gates on the whole dense model."""
