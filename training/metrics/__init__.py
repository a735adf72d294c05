"""Scores of driving answers, pure functions; the DriveLM challenge's as a command."""
