"""The bundle directory: its manifest, its one weight file, and what else lies in it."""
