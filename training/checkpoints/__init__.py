"""Checkpoint folders, and pretrained parts where there is no Hub."""
