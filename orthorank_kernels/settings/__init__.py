"""Launch settings as data: look-up and the files."""
