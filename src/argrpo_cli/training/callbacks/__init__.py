"""What happens around the updates: measuring, saving, grids, stopping, and showing it all."""
