"""Evaluation of language models: needle recall and bits per byte."""
