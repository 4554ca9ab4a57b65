"""Settings: their declarations, their sources, and the files that they name."""
