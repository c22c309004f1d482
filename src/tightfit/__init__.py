"""tightfit: plan the memory of a language model, prepare its checkpoint, prove that it fits."""

__version__ = "0.1.0"
