"""Search: which recipes to try next, and which of them to believe.

Recipes in, recipes out: nothing here imports torch, transformers or lm_eval.
"""
