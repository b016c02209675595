"""An archive from which a Jetson without network builds, proves and measures its engines."""
