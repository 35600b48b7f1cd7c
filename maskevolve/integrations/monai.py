"""MONAI's masked autoencoder of volumes and pictures."""

from typing import Any

from torch import Tensor, nn

from ..masks import Masking, num_visible
from ..teachers.average import unwrap
from .evolution import Evolution, Teacher


def apply_to_monai(model: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let MONAI's MaskedAutoEncoderViT mask with `masking`, in place of its own `_masking(x, masking_ratio)`.

    It returns what the model's own returns: visible patches, their indices, and the mask. The ratio stays that of the
    model or of the call. Patches lie in the order (D, H, W) of the axes of the volumes, [B, C, depth, height, width].

    Args:
        model: the MaskedAutoEncoderViT, of two or three dimensions; wrapped or compiled or not.
        masking: the mask.
        teacher: see `Evolution`. A PartTeacher is built from the same model.

    Returns:
        Evolution: what moves the masks along.

    Raises:
        TypeError: where the model is no MaskedAutoEncoderViT.
        ValueError: as `Evolution`.

    Examples:
        >>> import torch
        >>> from monai.networks.nets import MaskedAutoEncoderViT
        >>> from maskevolve import GridMask
        >>> sizes = {"hidden_size": 48, "num_heads": 2, "num_layers": 1, "decoder_num_heads": 2}
        >>> model = MaskedAutoEncoderViT(1, (32, 32, 32), (8, 8, 8), decoder_hidden_size=48, **sizes)
        >>> evolution = apply_to_monai(model, GridMask())
        >>> model(torch.randn(2, 1, 32, 32, 32))[1].sum(1)  # one of eight cells is cut to fit the ratio
        tensor([48, 48])

    Source: https://github.com/Project-MONAI/MONAI
    """
    model = unwrap(model)
    name = type(model).__name__
    embed = getattr(model, "patch_embedding", None)
    if not hasattr(model, "_masking") or not hasattr(model, "masking_ratio") or not isinstance(embed, nn.Module):
        raise TypeError(f"{name} is no MaskedAutoEncoderViT of MONAI: pass one, or see docs/hosts for other code bases")
    evolution = Evolution(model, masking, teacher, where=f"{name}._masking")
    evolution.note_images(embed)
    evolution.replace(model, "_masking", _masking)
    return evolution


def _masking(evolution: Evolution, module: Any, own: Any, x: Tensor, masking_ratio: float | None = None) -> Any:
    ratio = module.masking_ratio if masking_ratio is None else masking_ratio
    visible, mask, ids_restore = evolution.mask(x, num_visible(x.shape[1], ratio))
    return visible, ids_restore.argsort(1)[:, : visible.shape[1]], mask.int()
