"""The models of `tightfit demo`: a small real one, and a tiny invented one that needs no network.

Both are ordinary Hugging Face checkpoints when they are ready, so everything else in tightfit
treats them like a model of the user's own.
"""

from tightfit.demo.smollm2 import smollm2_checkpoint
from tightfit.demo.tiny import tiny_checkpoint

__all__ = ["smollm2_checkpoint", "tiny_checkpoint"]
