"""Choice of the layers that stay attention: one interface, many policies.

A policy measures variants of the teacher with a `Measurer` and returns a `Choice`; `POLICIES` has them by name.
"""
