"""The built-in engine: a small continuous-batching decoder that executes what a plan promises.

It loads the files that `shard` writes, allocates exactly the planned KV cache, runs the worst step
that its options allow, measures every component, and generates text. Read `session` first.
"""
