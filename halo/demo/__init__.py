"""A complete conversion that runs on a laptop: corpus, teacher, report."""
