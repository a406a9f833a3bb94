"""Students, their frozen teachers, and the losses between the two."""
