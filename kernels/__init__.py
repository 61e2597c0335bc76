"""Triton kernels beside their plain-torch definitions. None is written yet: attention runs through torch's operators."""
