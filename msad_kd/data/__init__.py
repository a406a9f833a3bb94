"""Images at two resolutions: the mapper, the resumable loader and data sets in COCO format."""
