"""A merge in memory: a live model whose weights change in place."""
