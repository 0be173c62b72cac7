"""A run directory: safe to interrupt, and readable."""
