"""The paper's numbers, and its tables in the nano world."""
