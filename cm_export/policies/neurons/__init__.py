"""One file for each rule that scores neurons, found by its name."""
