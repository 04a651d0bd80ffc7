"""The version, in a file of its own, so that nothing inside imports the package's front."""

__version__ = "0.1.0"
