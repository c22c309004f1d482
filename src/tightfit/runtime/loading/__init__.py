"""From files to a rank's parameters."""
