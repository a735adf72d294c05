"""Ratios against peers, in one run."""
