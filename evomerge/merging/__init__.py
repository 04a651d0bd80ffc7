"""Merging: recipes (plans as data), merge methods (pure tensor functions), model files, and the engine.

Importing this package or `evomerge.merging.recipe` does not import torch, so the search can use recipes as
plain data.
"""
