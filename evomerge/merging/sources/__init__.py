"""Models in files: checkpoints, adapters, and vocabularies matched by token."""
