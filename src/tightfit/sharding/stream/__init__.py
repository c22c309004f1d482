"""The bytes on their way: one pass over the source for all parts, or one part at a time."""
