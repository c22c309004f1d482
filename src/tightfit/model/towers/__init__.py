"""Encoders of images, video and audio: their parameters, and how many tokens an item becomes."""
