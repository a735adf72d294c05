"""Checkpoint folder → Hub repository."""
