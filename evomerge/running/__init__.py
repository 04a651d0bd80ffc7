"""Running: the run store, the budget, executors, and the worker that turns one recipe into scores."""
