"""The embedded benchmark on the toy world."""
