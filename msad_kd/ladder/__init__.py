"""Progressive distillation: a sequence of teachers, its controls and its order."""
