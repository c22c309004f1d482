"""The requests that all engines of `runtime_speed.py` get."""

from tightfit.runtime.bench import Load


def load_of(text: str) -> Load:
    """`requests:prompt tokens:answer tokens`, each of the last two a number or a range."""
    count, inputs, outputs = text.split(":")
    return Load(num_prompts=int(count), input_len=_range(inputs), output_len=_range(outputs))


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)
