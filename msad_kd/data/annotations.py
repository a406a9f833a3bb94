"""Annotation files in COCO format: read, checked in one pass, and normalised."""


def read_annotations(json_file: str, name: str, invalid: str = "error") -> dict:
    """Read an annotation file in COCO format, check every record and normalise it.

    Args:
        json_file: the annotation file.
        name: the data set's name, for messages.
        invalid: DATASETS.INVALID_ANNOTATIONS: "error" refuses a file with faulty images or
            annotations, "drop" leaves them out with a warning.

    Returns:
        The file's content: "images" with id, file_name, height and width; "annotations" with id
        (from 1, unique), image_id, category_id, bbox (x, y, width, height), area, iscrowd and
        perhaps segmentation, keypoints and num_keypoints; "categories" with id and name.

    Raises:
        InputError: if the file cannot be used; the message names records and causes.
    """
    raise NotImplementedError
