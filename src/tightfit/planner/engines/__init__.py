"""The engines that a plan can be made for: vLLM, and tightfit's own runtime."""
