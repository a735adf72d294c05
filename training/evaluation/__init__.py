"""Asking a checkpoint: controls, corruptions, answers, scores, figures."""
