"""Other runtimes that `latency.py` measures beside ours. In each file `build` writes a directory, `opened` opens it."""


class Unsupported(Exception):
    """This candidate cannot be had in this group."""
