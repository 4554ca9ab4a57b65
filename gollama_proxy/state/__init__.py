"""What a hub keeps beyond its own life."""
