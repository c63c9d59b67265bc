"""The error of the commands; standard library only, so that a command begins before torch and pydantic are loaded."""


class HaloError(Exception):
    """A mistake in the input of a command, described in one line: place, rule and value."""
