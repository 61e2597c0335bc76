"""Checkpoints: key maps as data, strict conversion, and files. Knows tensors and names, not models."""
