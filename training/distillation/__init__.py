"""Knowledge transfer: the teacher, its targets, the student with its loss."""
