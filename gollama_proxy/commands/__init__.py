"""Commands for people: for operators of a hub, for use without one, and a demo."""
