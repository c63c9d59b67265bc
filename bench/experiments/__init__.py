"""Experiments on the claims of the papers, each one command: `python -m bench.experiments run NAME`.

README.md has the questions, the tables and what follows from them; bench/results/experiments/ has the raw numbers.
"""
