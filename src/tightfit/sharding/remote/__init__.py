"""Outputs in object stores, which take files in order and as a whole."""
