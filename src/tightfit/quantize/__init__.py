"""Quantized checkpoints: `codecs` do the arithmetic, `virtual` streams tensors through them.

A quantized checkpoint is first a virtual one, whose tensors are computed when they are read. So
whatever reads checkpoints can write it: `quantize` as a plain one, `shard` as rank files, both with
their resume, executors and distant stores.
"""
