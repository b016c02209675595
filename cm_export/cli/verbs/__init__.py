"""One file for each verb of the command line, found by its name; each has a click command named command."""
