"""Fast decoding of one token at a time, without the decoder's modules.

`products` has the arithmetic, `self_attention` the tokens so far, `cross_attention` the memory, `state` the step.
"""

from vqa_scratch.generate.fast.state import FastState, GraphState, tree_states

__all__ = ["FastState", "GraphState", "tree_states"]
