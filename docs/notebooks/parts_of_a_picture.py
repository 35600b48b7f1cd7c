# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # See the parts of your own picture
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{OWNER}/{NAME}/blob/main/docs/notebooks/parts_of_a_picture.ipynb)
#
# The masks of `maskevolve` hide whole parts of a picture. This notebook cuts a picture into parts, shows the partitions
# for several numbers of parts, and draws masks from them. It needs no GPU and no trained model, and takes some seconds.

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
import timm
import torch
from PIL import Image
from torchvision.transforms.v2.functional import center_crop, resize, to_dtype, to_image

from maskevolve import EvolvingMask, GraphCutPartitioner, PartMask, PartTeacher
from maskevolve.viz import mask_picture, part_picture

torch.manual_seed(0)


def show(pictures):
    """Draw pictures in a row, with their titles."""
    size = 2.1 * len(pictures), 2.4
    _, axes = plt.subplots(1, len(pictures), figsize=size, layout="constrained")
    for ax, (title, picture) in zip(axes, pictures.items(), strict=True):
        ax.imshow(picture)
        ax.set_title(title, fontsize=10)
        ax.set_axis_off()
    plt.show()


# %% [markdown]
# ## The picture
#
# Set `path` to a picture of yours. On Colab, upload it first, with the folder symbol on the left.

# %%
path = None

photo = skimage.data.coffee() if path is None else Image.open(path).convert("RGB")
image = to_dtype(to_image(photo), torch.float32, scale=True)
image = center_crop(image, min(image.shape[1:]))
image = resize(image, [384, 384], antialias=True)  # [3, 384, 384] in [0, 1]

# %% [markdown]
# ## The parts
#
# A `PartTeacher` reads from a ViT how alike the patches of a picture are, and a graph cut makes parts of that. The
# outlines of the parts follow the contrast of the picture. The default reads the tokens before the first block, so an
# untrained ViT will do: its parts agree with those that people draw as well as those of a trained one, within the error
# of the measurement ([what it costs]({SITE}costs/), the table of teachers).
#
# One solve gives every number of parts: `hierarchy.cut(K)` splits one part of `hierarchy.cut(K - 1)` in two.

# %%
vit = timm.create_model("vit_tiny_patch16_384", pretrained=False)  # 24 x 24 patches
teacher = PartTeacher(vit, GraphCutPartitioner(), total_epochs=1, num_parts=(40, 40))
images = (image[None] - 0.5) / 0.5  # a batch, normalised as this ViT expects
hierarchy = teacher.hierarchy(images)

cuts = {f"{count} parts": hierarchy.cut(count)[0] for count in (2, 5, 10, 20)}
show({title: part_picture(image, parts, colours=True) for title, parts in cuts.items()})
show({title: part_picture(image, parts) for title, parts in cuts.items()})

# %% [markdown]
# ## Masks that hide parts
#
# A `PartMask` removes three quarters of the patches, part by part: one draw of random numbers decides which parts go
# first. Grey patches are removed.

# %%
parts = hierarchy.cut(10)
masks = PartMask().sample(4, 24, 0.75, parts=parts.expand(4, -1))  # True is removed
show({f"draw {place + 1}": mask_picture(image, masks[place]) for place in range(4)})

# %% [markdown]
# ## From a grid to parts
#
# In training, an `EvolvingMask` begins with a grid and ends with parts. `alpha` is the weight of the parts.

# %%
masking = EvolvingMask(100)
evolving = {}
for epoch in (0, 20, 50, 99):
    masking.set_epoch(epoch)
    mask = masking.sample(1, 24, 0.75, parts=parts)[0]
    title = f"epoch {epoch + 1}, alpha {float(masking.alpha):.2f}"
    evolving[title] = mask_picture(image, mask)
show(evolving)

# %% [markdown]
# ## How smooth the parts are
#
# `smoothness` weighs the outlines against the likeness of the patches: more of it gives smoother outlines, less of it
# more parts that are in several pieces.

# %%
smooth = {}
for smoothness in (1.0, 4.0, 16.0, 64.0):  # 16 is the default
    partitioner = GraphCutPartitioner(smoothness=smoothness)
    teacher = PartTeacher(vit, partitioner, total_epochs=1, num_parts=(10, 10))
    parts = teacher(images)[0]
    smooth[f"smoothness {smoothness:g}"] = part_picture(image, parts, colours=True)
show(smooth)

# %% [markdown]
# ## Go on
#
# - A pretrained ViT of any patch size: `FrozenTeacher`, in
#   [bring your own parts]({SITE}own_parts/).
# - How the cut works: [parts]({SITE}parts/).
# - These masks in a training run: the notebook "Evolving masks in your MAE".
