"""One parametric decoder for every family: a `ModelSpec` says all that is different about them."""
