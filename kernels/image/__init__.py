"""Pixels to patches: normalise and patchify from uint8."""
