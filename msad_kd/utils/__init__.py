"""What every room needs: errors, seeds, and the differences between two versions of Detectron2."""
