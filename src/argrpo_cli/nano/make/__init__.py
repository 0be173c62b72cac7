"""Training the nano world again."""
