"""Tiny checkpoints, a module for each group of families; :mod:`build` finds them."""
