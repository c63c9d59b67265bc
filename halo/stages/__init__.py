"""One file per stage of the conversion: a dataclass of numbers, build(), and loss() or run()."""
