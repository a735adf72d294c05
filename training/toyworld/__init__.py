"""The embedded data set: synthetic scenes with questions, and a small SmolVLM to start from."""
