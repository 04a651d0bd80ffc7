"""Search: which recipes to try next, and which candidates to keep.

Recipes in, recipes out: nothing here imports torch, transformers or lm_eval.
"""
