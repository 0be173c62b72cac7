"""The nano world's rewards."""
