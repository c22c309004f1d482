"""Per-rank checkpoints: which bytes go where, the copies, the manifest, and the proof.

Nothing here imports torch or numpy: sharding is moving byte ranges between files.
"""
