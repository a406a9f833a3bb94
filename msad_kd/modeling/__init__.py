"""Teachers and the parts of detectors: backbones, pyramids, fusion, FCOS."""
