"""One file for each stage of a build; build.py lists them in order."""
