"""Janus-Pro: one transformer for text and images, which draws image tokens after a prompt."""
