"""A quantized checkpoint as if it were none: its matrices are decoded when they are read."""

from tightfit.checkpoint.checkpoint import Checkpoint


def open_dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The unquantized checkpoint that a quantized one stands for, in the model's own dtype.

    One that is not quantized is returned as it is. Its config has no `quantization_config`, and
    scales of activations and of the KV cache are left out.

    Raises:
        UnsupportedModelError: a method, or a detail of one, that is not decoded.
        CheckpointError: it lacks weights, or they are not what config.json says.
    """
    raise NotImplementedError
