"""How many patches a mask ratio leaves."""

from ..checks import is_number, is_whole


def num_visible(num_patches: int, mask_ratio: float = 0.75, keep: int | None = None) -> int:
    """How many patches stay: ``int(N * (1 - mask_ratio))``, rounded down as in MAE, or `keep`.

    Args:
        num_patches: number of patches N of one image.
        mask_ratio: share of patches to remove, in [0, 1).
        keep: in place of mask_ratio, the number of patches that stay, from 1 to N.

    Raises:
        ValueError: where mask_ratio is no number in [0, 1), or so high that nothing stays; where keep is no whole
            number from 1 to N, or is given beside another mask_ratio than the default.

    Examples:
        >>> num_visible(196, 0.75), num_visible(196, keep=50)
        (49, 50)
    """
    one = "the same for all images of a batch"
    if keep is not None:
        if not is_number(mask_ratio) or mask_ratio != 0.75:
            raise ValueError(f"keep={keep!r} takes the place of mask_ratio={mask_ratio!r}: give one of them")
        if not is_whole(keep) or not 1 <= keep <= num_patches:
            raise ValueError(f"keep={keep!r} is no whole number in [1, N={num_patches}]: how many patches stay, {one}")
        return int(keep)
    if not is_number(mask_ratio):
        raise ValueError(f"mask_ratio={mask_ratio!r} is no number in [0, 1): the share of patches to remove, {one}")
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio} is outside [0, 1): it is the share of patches to remove")
    visible = int(num_patches * (1 - mask_ratio))
    if visible < 1:
        most = next(step / 1e4 for step in range(10**4, -1, -1) if int(num_patches * (1 - step / 1e4)) or not step)
        raise ValueError(f"mask_ratio={mask_ratio} leaves no visible patch of N={num_patches}: pass one in [0, {most}]")
    return visible
