"""Write a merge to disk, as a model folder or as a LoRA adapter."""
