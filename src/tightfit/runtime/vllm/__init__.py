"""The same plan in an installed vLLM."""
