"""The workers: which there are, their health, and what was learnt about them."""
