"""A complete conversion that runs on a laptop: its text, teacher and report."""
