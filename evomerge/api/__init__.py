"""The Python interface: what the commands do, as functions. `import evomerge` has the main ones."""
