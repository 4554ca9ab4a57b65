"""Settings: what there is, where it comes from, and the files that they name."""
