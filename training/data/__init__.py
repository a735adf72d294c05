"""Prepared data: DriveLM files, rows, questions in DriveLM's wording, what priors know."""
