"""Commands that are not a hub: for its operators, without one, and the demo."""
