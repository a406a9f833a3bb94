"""Reading files of weights: every fault of a file is one sentence, and no file runs code."""

from msad_kd.utils.unpickle import trust_files

__all__ = ["read_checkpoint", "trust_files"]


def read_checkpoint(path: str, purpose: str) -> dict:
    """Return the contents of a file of weights, with checked weights on the CPU.

    Args:
        path: a .pth, .pyth, .pkl or .safetensors file, or an address that Detectron2 downloads;
            ``#sha256=<64 hexadecimal digits>`` may follow it. A file ``<path>.sha256`` beside it,
            in the format of sha256sum, is checked too.
        purpose: what needs the file, for error messages: a config key, or "the teacher of ...".

    Returns:
        What the file holds, with "model": {key: tensor}. A state dict without a "model" around it
        becomes the "model". Files of other projects also have "matching_heuristics": True and
        "__author__", by which Detectron2's checkpointer matches their keys.

    Raises:
        InputError: if the file is missing, unreadable, another one than its hash says, or no
            checkpoint, or if a weight is not finite or not a dense tensor.
    """
    raise NotImplementedError
