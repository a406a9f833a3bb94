"""Images at two resolutions: the mapper, the resumable loader and COCO-format data sets."""
