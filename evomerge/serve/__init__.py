"""Pages of runs for the browser of the same user on the same machine."""
