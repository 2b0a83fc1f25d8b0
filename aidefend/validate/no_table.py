"""Why an object is no table."""


class NoTable(Exception):
    """The message is the fault."""
