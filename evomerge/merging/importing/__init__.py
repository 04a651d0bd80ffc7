"""Turns what a merge can't read (quantised, pickled and GGUF models) into an ordinary safetensors folder."""
