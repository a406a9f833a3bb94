"""Errors, seeds, flat configs, and the differences between versions of the libraries below us."""
