"""Quantized checkpoints: what becomes of each matrix, and tensors that are made as they are read.

A quantized checkpoint is first a virtual one (`computed_source`). So whatever reads checkpoints can
write it: `quantize` as a plain one, `shard` as rank files, both with their resume, executors and
distant stores.
"""
