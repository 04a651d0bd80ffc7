"""Evaluation: a Suite lists the tasks, the harness scores models on them, and statistics compare scores.

Importing this package, `suite`, `scores` or `statistics` does not import torch or lm_eval.
"""
