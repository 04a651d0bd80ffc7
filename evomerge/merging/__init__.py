"""Merging: a Recipe (plan as data), methods (pure tensor functions), checkpoints and the engine.

Importing this package or `evomerge.merging.recipe` does not import torch, so that the search can use
recipes as plain data.
"""
