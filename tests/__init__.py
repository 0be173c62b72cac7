"""The tests. A package of its own, since some libraries install one of this name, which would be found instead."""
