"""Checkpoints: strict loading, a student's start from its teacher, stripping, atomic writes."""
