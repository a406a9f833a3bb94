"""Export a trained detector: files for stock Detectron2, TorchScript and ONNX.

Every traced model has one input, ``image``: (3, H, W), float32, values 0..255, channels in the
order of ``INPUT.FORMAT``. Its outputs, for R detections sorted by score:

- ``boxes``: (R, 4), float32, x0, y0, x1, y1 in pixels of the input image.
- ``scores``: (R,), float32.
- ``classes``: (R,), int64, indices of the class names.
- ``masks``: (R, 28, 28), float32, probabilities inside the box (only of models with masks);
  ``detectron2.layers.paste_masks_in_image`` pastes them into the image.
"""
