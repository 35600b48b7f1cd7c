# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Evolving masks in your MAE
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{OWNER}/{NAME}/blob/main/docs/notebooks/evolving_masks_in_your_mae.ipynb)
#
# This notebook trains a small masked autoencoder on a few photographs, with masks that evolve from a grid to parts of
# the picture. The model is written as the official MAE is, and is not edited: three lines beside it do the work. It
# takes less than a minute on two CPU cores. So short a run shows how to do it, not what it is good for.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("maskevolve") is None:  # on Colab
    source = "maskevolve[examples] @ git+{REPOSITORY}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, source], check=True)

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import skimage
import torch
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2.functional import center_crop, resize, to_dtype, to_image

from maskevolve import EvolvingMask, GraphCutPartitioner, PartTeacher
from maskevolve.integrations import apply_to_mae
from maskevolve.viz import evolution_figure

seed = torch.manual_seed(0)

# %% [markdown]
# ## Your model
#
# Here stands your own MAE. This small one has what `apply_to_mae` looks for, as the official one and its forks have:
# `random_masking` and `patch_embed`.


# %%
class MAE(nn.Module):
    """A small masked autoencoder with the interface of the official one."""

    def __init__(self, image_size=96, patch_size=8, width=96, depth=4, heads=4):
        super().__init__()
        self.patch_embed = PatchEmbed(image_size, patch_size, 3, width)
        count = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.2 * torch.randn(1, count, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(0.2 * torch.randn(1, 1 + count, width))
        self.decoder_blocks = nn.Sequential(Block(width, heads))
        self.decoder_pred = nn.Linear(width, 3 * patch_size**2)

    def random_masking(self, x, mask_ratio):
        keep = int(x.shape[1] * (1 - mask_ratio))
        ids = torch.rand(x.shape[:2], device=x.device).argsort(1)
        ids_restore = ids.argsort(1)
        visible = x.take_along_dim(ids[:, :keep, None], 1)
        return visible, (ids_restore >= keep).float(), ids_restore

    def forward_encoder(self, images, mask_ratio):
        x = self.patch_embed(images) + self.pos_embed
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x)), mask, ids_restore

    def forward_decoder(self, x, ids_restore):
        count = 1 + ids_restore.shape[1] - x.shape[1]
        patches = torch.cat([x[:, 1:], self.mask_token.expand(len(x), count, -1)], 1)
        patches = patches.take_along_dim(ids_restore[..., None], 1)
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_blocks(x))[:, 1:]

    def forward(self, images, mask_ratio=0.75):
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio)
        prediction = self.forward_decoder(latent, ids_restore)
        size = self.patch_embed.patch_size[0]
        target = nn.functional.unfold(images, size, stride=size).mT
        error = (prediction - target).square().mean(-1)
        return (error * mask).sum() / mask.sum(), prediction, mask


# %% [markdown]
# ## Your data
#
# Random crops of four photographs that come with scikit-image.


# %%
def squares(size):
    """The middle squares of the photographs, [4, 3, size, size] in [0, 1]."""
    photos = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photo = to_dtype(to_image(getattr(skimage.data, name)()), torch.float32, scale=True)
        photos.append(resize(center_crop(photo, min(photo.shape[1:])), [size, size]))
    return torch.stack(photos)


photos = squares(192)
crop = RandomResizedCrop(96, scale=(0.2, 1.0))


def batch():
    """Crops of the photographs, [16, 3, 96, 96], from -1 to 1."""
    return torch.cat([crop(photos) for _ in range(4)]) * 2 - 1


# %% [markdown]
# ## The three lines
#
# The teacher is a slow copy of your model, which cuts the parts. `decay` says how slow it is: runs of fewer than some
# ten thousand steps want less than its default of 0.9999. A grid of 12 x 12 patches wants fewer parts than the
# default of 40 to 10.

# %%
epochs, steps = 20, 6
model = MAE()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))

settings = {"num_parts": (20, 8), "decay": 0.98}
teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=epochs, **settings)
evolution = apply_to_mae(model, EvolvingMask(epochs), teacher)
evolution.follow(optimizer)
print(f"masks are drawn by {type(evolution.masking).__name__}")

# %% [markdown]
# ## Train
#
# Your loop gets one more line, `evolution.set_epoch(epoch)`. At four points of training we keep the masks of two
# photographs and the parts that they were drawn from.

# %%
losses, alphas, titles, masks, parts = [], [], [], [], []
shown = resize(photos, [96, 96]) * 2 - 1
for epoch in range(epochs):
    evolution.set_epoch(epoch)
    total = 0.0
    for _ in range(steps):
        loss, _, _ = model(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    losses.append(total / steps)
    alphas.append(float(evolution.masking.alpha))
    if epoch in (0, epochs // 3, 2 * epochs // 3, epochs - 1):
        with torch.no_grad():
            model(shown)
        titles.append(f"epoch {epoch + 1} of {epochs}")
        masks.append(evolution.last_mask[::2])  # of two of the photographs
        parts.append(evolution.last_parts[::2])

# %% [markdown]
# ## Look
#
# Two rows for each photograph: its parts, and the patches that the model sees. At first the masks are
# near to a grid, at the end they hide whole parts.

# %%
evolution_figure(photos[::2], masks, parts, titles)

# %% [markdown]
# The loss is the error on hidden patches. It need not fall to the end, for the task gets harder as `alpha`, the weight
# of the parts, rises.

# %%
_, ax = plt.subplots(figsize=(5, 2.6), layout="constrained")
ax.plot(range(1, epochs + 1), losses)
ax.set(xlabel="epoch", ylabel="loss", ylim=(0, None), xticks=range(0, epochs + 1, 5))
right = ax.twinx()
right.plot(range(1, epochs + 1), alphas, color="tab:orange")
right.set_ylim(0, 1.02)
right.set_ylabel("alpha", color="tab:orange")
plt.show()

# %% [markdown]
# ## Save and resume
#
# Save the state of the evolution with your checkpoint, and torch's random state, so that a resumed run draws the masks
# that it would have drawn.

# %%
checkpoint = {
    "model": model.state_dict(),
    "optimizer": optimizer.state_dict(),
    "evolution": evolution.state_dict(),
    "random": torch.get_rng_state(),
}

# in the run that goes on, after the same lines as above
model.load_state_dict(checkpoint["model"])
optimizer.load_state_dict(checkpoint["optimizer"])
evolution.load_state_dict(checkpoint["evolution"])
torch.set_rng_state(checkpoint["random"])

# %% [markdown]
# ## Back to the old masks
#
# For a comparison, or when pretraining is over.

# %%
evolution.remove()
loss, prediction, mask = model(batch())  # with the model's own random masks

# %% [markdown]
# ## Go on
#
# - Other models, from timm, Hugging Face, Lightly and stable-pretraining:
#   [in your code base]({SITE}hosts/).
# - Parts from labels of your own: [bring your own parts]({SITE}own_parts/).
# - What is known about what it brings: [results]({SITE}results/).
