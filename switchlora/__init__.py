"""Training that starts with all parameters and finishes with a low-rank adapter."""

__version__ = "0.1.0"
