"""Checkpoints: strict loading, a student's start from its teacher, atomic file writes."""
