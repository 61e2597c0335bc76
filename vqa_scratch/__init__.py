"""Visual question answering and reinforcement learning from feedback, written out in PyTorch."""

__version__ = "0.1.0"
