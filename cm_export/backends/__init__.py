"""One folder or file for each runtime, found by its name; each has open(bundle, ...) and implements host/backend.py."""
