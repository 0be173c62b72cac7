"""A package, and no mere folder: torch-fidelity installs one called tests, which would come first."""
