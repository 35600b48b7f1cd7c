"""Affinities to parts by EM clustering: the paper's released code."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..checks import check_number, check_whole
from ..grid import GridSize, resolve_grid
from .affinity import Partitioner, safe_divisor
from .hierarchy import check_num_parts
from .segmentation import renumber


class EMPartitioner(Partitioner):
    """Parts as the paper's released code makes them: EM clustering of the affinity's columns.

    The released code sums attention over the 12 x 12 heads and blocks of a ViT-B and multiplies it by 40 in a softmax;
    any affinity is brought to that scale here. Starts from random unit means, drawn for each image from torch's default
    generator.

    Args:
        num_parts: number of parts K where the call names none.
        steps: EM steps.
        kappa: scale of the kernel.

    Examples:
        >>> EMPartitioner(num_parts=4)(torch.rand(2, 196, 196)).shape
        torch.Size([2, 196])

    Source: the released code of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001;
    EM attention, https://arxiv.org/abs/1907.13426
    """

    def __init__(self, num_parts: int = 10, *, steps: int = 15, kappa: float = 40.0) -> None:
        super().__init__(num_parts)
        check_whole("steps", steps, 0, "the EM steps")
        check_number("kappa", kappa, "a number of at least 0: the scale of the kernel")
        self.steps, self.kappa = steps, kappa

    @torch.no_grad()
    def forward(self, affinity: Tensor, num_parts: int | None = None, grid_size: GridSize | None = None) -> Tensor:
        """Cluster every image into at most `num_parts` parts: see `GraphCutPartitioner.forward`, but for the images."""
        num_parts, affinity = check_num_parts(num_parts, self.num_parts), self.clean(affinity).float()
        resolve_grid(affinity.shape[1], grid_size)
        with torch.autocast(affinity.device.type, enabled=False):
            maps = affinity.shape[1] * 144 / safe_divisor(affinity.sum((1, 2), keepdim=True))
            features = affinity.mT * maps  # one row a patch: how much each patch attends to it
            members = self._members(features, features.new_empty(len(features), num_parts, features.shape[2]).normal_())
            for _ in range(self.steps):
                members = self._members(features, members.mT @ features)
            return renumber(members.argmax(2))

    def _members(self, features: Tensor, means: Tensor) -> Tensor:
        """How much of each mean is each patch, [B, N, K]."""
        members = (self.kappa * features @ normalize(means, dim=2).mT).softmax(2)
        return members / (1e-6 + members.sum(1, keepdim=True))
