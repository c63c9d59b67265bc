"""The start of the `hypenet` and `halo` commands, and the `hypenet` command itself.

Importing `hypenet` loads torch and transformers to register the model, which takes seconds. This package imports
neither, so that help, the version and the line that names a missing package appear at once.
"""
