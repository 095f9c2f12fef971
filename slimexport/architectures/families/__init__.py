"""One short file for each family, found by the registry."""
