"""What every stage does: read its command line, write whole files, leave a note, say how a recipe runs it."""
