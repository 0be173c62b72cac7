"""The ground: errors, files, processes, progress, grids."""
