"""Where a bundle goes after it was built: one file per destination, and what destinations share."""
