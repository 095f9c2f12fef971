"""The stages of the road, one file each: from a locked run directory and a config to files in that directory."""
