"""Measurements of policies, one module per benchmark."""
