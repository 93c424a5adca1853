"""Threads of the backend's runtime."""

import keras

from secateur.errors import ModelError


def set_threads(threads: int) -> None:
    """Pin the backend to a number of CPU threads; ModelError when TensorFlow has begun to run already."""
    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(threads)
        return
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        raise ModelError(
            "TensorFlow has begun to run, so its threads are fixed; set them first, or TF_NUM_INTRAOP_THREADS"
        ) from None
