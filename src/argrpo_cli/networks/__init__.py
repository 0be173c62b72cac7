"""Networks that several parts share, and reading their weights safely."""
