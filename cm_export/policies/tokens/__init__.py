"""One file for each rule that scores image tokens, found by its name."""
