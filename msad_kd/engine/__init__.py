"""The trainer, its hooks and the launcher."""
