"""Several processes that work on one model."""
