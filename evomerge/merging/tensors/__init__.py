"""One output tensor: its inputs, the compiled kernels, and the one function that merges it."""
