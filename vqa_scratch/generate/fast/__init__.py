"""Decoding one token at a time without the decoder's modules: what a step needs, in the order of a step.

`products` is the arithmetic, `self_attention` the tokens so far, `cross_attention` the memory, `state` the step itself.
"""

from vqa_scratch.generate.fast.state import FastState, GraphState, tree_states

__all__ = ["FastState", "GraphState", "tree_states"]
