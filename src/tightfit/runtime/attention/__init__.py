"""How tokens attend: backends, the cache that they read, and the probe that chooses."""
