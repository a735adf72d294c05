"""Stages: each is `python -m training.STAGE`, each has `main(args)`; rooms hold what they share."""
