"""Where a bundle goes after it was built: one folder for each destination."""
