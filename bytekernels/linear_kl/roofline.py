"""FLOPs and bytes of linear_kl: n rows, V entries of the vocabulary, a student of width d and a teacher of width e."""

import torch

from bytekernels.roofline import Work


def linear_kl(rows: int, vocabulary: int, width: int, teacher_width: int, dtype: torch.dtype) -> Work:
    """The loss alone. FLOPs: the logits' two products; what is done once per logit is left out."""
    inputs = (rows + vocabulary) * (width + teacher_width)
    return Work(2 * rows * vocabulary * (width + teacher_width), inputs * dtype.itemsize + 4)


def linear_kl_with_gradients(rows: int, vocabulary: int, width: int, teacher_width: int, dtype: torch.dtype) -> Work:
    """The loss and its gradients to the student's rows and weight, which take a product each."""
    made = Work(4 * rows * vocabulary * width, (rows + vocabulary) * width * dtype.itemsize)
    return linear_kl(rows, vocabulary, width, teacher_width, dtype) + made
