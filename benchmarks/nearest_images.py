"""How far images are from those that a flow was trained on."""

import torch


def distances_to_nearest(images: torch.Tensor, train_images: torch.Tensor) -> torch.Tensor:
    """
    The Euclidean distance of each image to the training image nearest to it. Copies are at 0.

    Args:
        images (`torch.Tensor`): `(num_images, num_values)`.
        train_images (`torch.Tensor`): `(num_train_images, num_values)`, in the same units.
    Returns:
        `torch.Tensor`: `(num_images,)`.
    """
    # The quick way by inner products would lose the digits of small distances, which are those of copies.
    return torch.cdist(images, train_images, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
