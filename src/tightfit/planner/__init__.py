"""What an engine will allocate, line by line, from the shapes of a model and the engine's options.

Nothing here imports torch, transformers or numpy: a plan takes a fraction of a second.
"""
