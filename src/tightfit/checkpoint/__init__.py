"""Checkpoints as bytes: where a model's files are, what their headers say, how files are written.

Nothing here loads a tensor. A checkpoint is a `config.json` and a dictionary from tensor name to
(file, offset, length); planning sums it and sharding copies ranges of it.
"""
