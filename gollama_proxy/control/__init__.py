"""What operators use: the admin API, explanations and events."""
