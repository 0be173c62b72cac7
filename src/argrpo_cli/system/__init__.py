"""The ground: errors, files, devices, processes, progress, the hub."""
