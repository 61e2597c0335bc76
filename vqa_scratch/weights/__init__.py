"""Checkpoints: key maps as data, strict conversion, and files. Works on tensors and names, not on models."""
