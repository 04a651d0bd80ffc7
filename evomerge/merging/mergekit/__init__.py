"""mergekit's YAML, read into recipes and written from them."""
