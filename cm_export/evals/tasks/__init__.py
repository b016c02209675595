"""One file for each task, found by its name: KINDS, questions(kind), open_picture(name)."""
