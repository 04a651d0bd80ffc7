"""Measures of models: task vectors, where they conflict, and Fisher information."""
