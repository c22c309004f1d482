"""Forms of quantized checkpoints: what stands for a weight on disk and on the device."""
