"""Evaluation: a Suite says what a model is scored on, the harness scores it, statistics compare.

Importing this package, `suite`, `scores` or `statistics` does not import torch or lm_eval.
"""
