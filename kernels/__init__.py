"""Triton kernels beside their plain-torch definitions. None yet: attention runs through the operators of torch."""
