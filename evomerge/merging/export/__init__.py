"""A merge on disk: as a model folder or as a LoRA adapter."""
