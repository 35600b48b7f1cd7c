"""Small models of clips, volumes, spectrograms and waves, in the shape of the code bases that people train with."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers as hf
from monai.networks.nets import MaskedAutoEncoderViT
from timm.models.vision_transformer import PatchEmbed
from torch import nn
from vits import MAE

from maskevolve.integrations import apply_to_mae, apply_to_mim


def patches_of(images, kernel, stride=None):
    """Patches of images [B, C, ...] of any number of axes, [B, N, pixels], the last axis fastest."""
    axes = len(kernel)
    for axis, (reach, step) in enumerate(zip(kernel, stride or kernel, strict=True)):
        images = images.unfold(2 + axis, reach, step)
    return images.movedim(1, -1).flatten(1 + axes).flatten(1, axes)


class Embed(nn.Module):
    """A patch embedding by one convolution; where it knows frames, it keeps time apart: [B, T, H * W, 48]."""

    def __init__(self, channels, kernel, stride=None, **attributes):
        super().__init__()
        self.proj = getattr(nn, f"Conv{len(kernel)}d")(channels, 48, kernel, stride or kernel)
        vars(self).update(attributes)

    def forward(self, images):
        x = self.proj(images).flatten(2).mT
        return x.unflatten(1, (-1, 15)) if hasattr(self, "frames") else x


class Fork(MAE):
    """An MAE with another embedding, of as many patches, each of as many pixels."""

    def __init__(self, embed, number, channels, kernel, stride=None):
        super().__init__()
        self.patch_embed, self.kernel, self.stride = embed, kernel, stride
        self.pos_embed = nn.Parameter(torch.randn(1, number, 48))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + number, 48))
        self.decoder_pred = nn.Linear(48, channels * torch.Size(kernel).numel())

    def run_blocks(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.norm(nn.Sequential(*self.blocks)(x))

    def forward_loss(self, images, prediction, mask):
        error = (prediction - patches_of(images, self.kernel, self.stride)).square().mean(-1)
        return (error * mask).sum() / mask.sum()


class Video(Fork):
    """As mae_st: the size of patches is said within a frame, positions are added after masking, and four results."""

    def __init__(self, frames=8, depth=2):
        sizes = {"patch_size": (8, 8), "img_size": (24, 40), "frames": frames, "input_size": (frames // depth, 3, 5)}
        super().__init__(Embed(3, (depth, 8, 8), **sizes), frames // depth * 15, 3, (depth, 8, 8))

    def random_masking(self, x, mask_ratio):
        visible, mask, ids_restore = super().random_masking(x, mask_ratio)
        return visible, mask, ids_restore, ids_restore.argsort(1)[:, : visible.shape[1]]

    def forward_encoder(self, x, mask_ratio):
        x, mask, ids_restore, ids_keep = self.random_masking(self.patch_embed(x).flatten(1, 2), mask_ratio)
        positions = self.pos_embed.expand(len(x), -1, -1).take_along_dim(ids_keep[..., None], 1)
        return self.run_blocks(x + positions), mask, ids_restore


class Encoder(nn.Module):
    """As Prithvi's: coordinates before the ratio, noise that may be given, and features of all patches."""

    run_blocks = Fork.run_blocks

    def __init__(self, whole, frames):
        super().__init__()
        for name in ("patch_embed", "pos_embed", "cls_token", "blocks", "norm"):
            setattr(self, name, getattr(whole, name))
            delattr(whole, name)
        self.img_size, self.num_frames = (24, 40), frames

    def random_masking(self, sequence, mask_ratio, noise=None):
        shuffle = (torch.rand(sequence.shape[:2]) if noise is None else noise).argsort(1)
        restore, keep = shuffle.argsort(1), int(sequence.shape[1] * (1 - mask_ratio))
        return sequence.take_along_dim(shuffle[:, :keep, None], 1), (restore >= keep).float(), restore

    def forward(self, x, temporal_coords=None, location_coords=None, mask_ratio=0.75):
        x, mask, ids_restore = self.random_masking(self.patch_embed(x) + self.pos_embed, mask_ratio)
        return self.run_blocks(x), mask, ids_restore

    def forward_features(self, x, temporal_coords=None, location_coords=None):
        return [self.run_blocks(self.patch_embed(x) + self.pos_embed)]


class Prithvi(Fork):
    """As Prithvi: a decoder around the encoder, which masks."""

    def __init__(self, frames=4):
        embed = Embed(6, (1, 8, 8), patch_size=(1, 8, 8), input_size=(frames, 24, 40))
        super().__init__(embed, frames * 15, 6, (1, 8, 8))
        self.encoder = Encoder(self, frames)

    def forward_encoder(self, x, mask_ratio):
        return self.encoder(x, mask_ratio=mask_ratio)


class Temporal(Fork):
    """As SatMAE's of time series: frames are embedded one after the other, and their dates come with them."""

    def __init__(self):
        super().__init__(PatchEmbed((24, 40), 8, 3, 48), 45, 3, (1, 8, 8))

    def forward_encoder(self, clips, timestamps, mask_ratio):
        x = torch.cat([self.patch_embed(frame) for frame in clips.unbind(1)], 1) + self.pos_embed
        x = x + timestamps.sin().repeat_interleave(15, 1)[..., None]
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        return self.run_blocks(x), mask, ids_restore

    def forward(self, clips, timestamps, mask_ratio=0.75):
        latent, mask, ids_restore = self.forward_encoder(clips, timestamps, mask_ratio)
        prediction = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(clips.transpose(1, 2), prediction, mask), prediction


class Groups(Fork):
    """As SatMAE's of spectra: an embedding for each group of channels."""

    def __init__(self):
        super().__init__(nn.ModuleList([PatchEmbed((24, 40), 8, 2, 48) for _ in range(3)]), 45, 1, (2, 8, 8))

    def forward_encoder(self, images, mask_ratio):
        groups = zip(self.patch_embed, images.split(2, 1), strict=True)
        x = torch.cat([embed(group) for embed, group in groups], 1) + self.pos_embed
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        return self.run_blocks(x), mask, ids_restore

    def forward_loss(self, images, prediction, mask):
        return super().forward_loss(images[:, None], prediction, mask)


class Host(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of an image, a clip ..., as the model takes it."""
    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    call: Callable[..., Any] = lambda model, images, ratio: model(images, mask_ratio=ratio)[:2]
    """The loss of images, and what is predicted, at a mask ratio."""
    put: Callable[..., Any] = apply_to_mae
    body: str = ""
    """What is masked."""
    view: Callable[..., Any] = lambda images: images
    """Images as [B, C, ...], with the axes of the grid."""
    can_teach: bool = True

    def apply(self, model, masking, teacher=None, ratio=0.75):
        ratios = {"mask_ratio": ratio} if self.put is apply_to_mim else {}
        return self.put(model.get_submodule(self.body), masking, teacher, **ratios)

    def images(self, seed=1):
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(seed))

    def run(self, model, images, ratio=0.75, seed=1):
        torch.manual_seed(seed)
        return self.call(model, images, ratio)


def call_temporal(model, clips, ratio):
    return model(clips, torch.arange(3.0).expand(len(clips), -1), mask_ratio=ratio)


def call_video_mae(model, clips, ratio):
    """With the mask of a collator, which is replaced."""
    number = model.base_model.embeddings.num_patches
    output = model(clips, bool_masked_pos=torch.arange(number).expand(len(clips), -1) < 3 * number // 4)
    return (output.loss, output.logits) if "loss" in output else (output[0].square().mean(), output[0])


def call_monai(model, images, ratio):
    prediction, mask = model(images, masking_ratio=ratio)
    error = (prediction - patches_of(images, model.patch_size)).square().mean(-1)
    return (error * mask).sum() / mask.sum(), prediction


def video_mae(kind, frames=8, tube=2):
    config = {"image_size": (24, 40), "patch_size": 8, "num_frames": frames, "tubelet_size": tube}
    for part in ("", "decoder_"):
        config |= {f"{part}hidden_size": 48, f"{part}num_attention_heads": 3, f"{part}intermediate_size": 96}
    config |= {"num_hidden_layers": 3, "decoder_num_hidden_layers": 1, "initializer_range": 0.2}
    shapes = (frames, 3, 24, 40), (frames // tube, 3, 5), (tube, 8, 8)
    how = {"call": call_video_mae, "put": apply_to_mim, "view": lambda clips: clips.transpose(1, 2)}
    return Host(lambda: kind(hf.VideoMAEConfig(**config)), *shapes, **how)


def monai(channels, size, patch, projection="conv"):
    sizes = {"hidden_size": 48, "mlp_dim": 96, "num_layers": 3, "num_heads": 3, "decoder_hidden_size": 48}
    sizes |= {"decoder_num_layers": 1, "decoder_num_heads": 3, "decoder_mlp_dim": 96, "spatial_dims": len(size)}
    make = partial(MaskedAutoEncoderViT, channels, size, patch, proj_type=projection, **sizes)
    grid = tuple(side // one for side, one in zip(size, patch, strict=True))
    return Host(make, (channels, *size), grid, patch, call=call_monai)


def spectrograms():
    """As AudioMAE: overlapping patches, and a size given the wrong way round."""
    return Fork(Embed(1, (16, 16), (8, 8), patch_size=(16, 16), img_size=(32, 64)), 21, 1, (16, 16), (8, 8))


SERIES = {"put": partial(apply_to_mae, grid_size=(3, 3, 5)), "can_teach": False}
TIME, GROUPS = {"view": lambda clips: clips.transpose(1, 2), **SERIES}, {"view": lambda x: x[:, None], **SERIES}
ALONE = {"body": "encoder", "view": lambda clips: clips[:, :, 0]}
HOSTS = {
    "mae_st": Host(Video, (3, 8, 24, 40), (4, 3, 5), (2, 8, 8)),
    "Prithvi": Host(Prithvi, (6, 4, 24, 40), (4, 3, 5), (1, 8, 8), body="encoder"),
    "Prithvi of one frame": Host(partial(Prithvi, 1), (6, 1, 24, 40), (3, 5), (8, 8), **ALONE),
    "SatMAE of time": Host(Temporal, (3, 3, 24, 40), (3, 3, 5), (1, 8, 8), call=call_temporal, **TIME),
    "SatMAE of channels": Host(Groups, (6, 24, 40), (3, 3, 5), (2, 8, 8), **GROUPS),
    "AudioMAE": Host(spectrograms, (1, 64, 32), (7, 3), (16, 16), (8, 8)),
    "waves": Host(lambda: Fork(Embed(2, (16,)), 12, 2, (16,)), (2, 192), (12,), (16,)),
    "VideoMAE": video_mae(hf.VideoMAEForPreTraining),
    "VideoMAE of three frames": video_mae(hf.VideoMAEForPreTraining, 3, 1),
    "bare VideoMAE": video_mae(hf.VideoMAEModel),
    "MONAI": monai(1, (16, 24, 40), (4, 8, 8)),
    "MONAI's perceptron": monai(2, (16, 24, 40), (4, 8, 8), "perceptron"),
    "MONAI of pictures": monai(3, (24, 40), (8, 8)),
}


def make(name, seed=0):
    model = HOSTS[name].make()
    torch.manual_seed(seed)
    for weight in model.parameters():  # attention that is far from even, and weights that differ with the seed
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    return model
