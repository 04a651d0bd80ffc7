"""Models as they lie in files: checkpoints, adapters, and vocabularies matched by token."""
