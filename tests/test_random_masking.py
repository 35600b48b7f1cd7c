"""Stand-ins for `random_masking` take what it takes and return what it returns, in MAE's descendants, too."""

import pytest
import torch
from vits import MAE, make_teacher

from maskevolve import EvolvingMask, RandomMask
from maskevolve.integrations import apply_to_mae
from maskevolve.teachers.random_masking import learn_results


class Host(MAE):
    """An MAE that calls its random_masking in the way of another code base."""

    def forward_encoder(self, x, mask_ratio, noise=None):
        x, mask, ids_restore = self.mask(self.patch_embed(x) + self.pos_embed, mask_ratio, noise)
        for block in self.blocks:
            x = block(x)
        return self.norm(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)), mask, ids_restore


class Pixio(Host):
    """A third argument, without which it cannot be called."""

    def random_masking(self, x, mask_ratio, grid):
        assert x.shape[1] % grid == 0
        return MAE.random_masking(self, x, mask_ratio)

    def mask(self, x, mask_ratio, noise):
        return self.random_masking(x, mask_ratio, 4)


class Prithvi(Host):
    """Other names, and noise."""

    def random_masking(self, sequence, mask_ratio, noise=None):
        noise = torch.rand(sequence.shape[:2]) if noise is None else noise
        shuffle = noise.argsort(1)
        restore, keep = shuffle.argsort(1), int(sequence.shape[1] * (1 - mask_ratio))
        visible = sequence.gather(1, shuffle[:, :keep, None].expand(-1, -1, sequence.shape[2]))
        return visible, (restore >= keep).float(), restore

    def mask(self, x, mask_ratio, noise):
        return self.random_masking(sequence=x, mask_ratio=mask_ratio, noise=noise)


class MAEst(Host):
    """Four results."""

    def random_masking(self, x, mask_ratio):
        visible, mask, restore = MAE.random_masking(self, x, mask_ratio)
        return visible, mask, restore, restore.argsort(1)[:, : visible.shape[1]]

    def mask(self, x, mask_ratio, noise):
        visible, mask, restore, keep = self.random_masking(x, mask_ratio)
        assert torch.equal(visible, x.gather(1, keep[..., None].expand(-1, -1, x.shape[2])))
        return visible, mask, restore


class ConvMAE(Host):
    """Three results, the first of which are indices."""

    def random_masking(self, x, mask_ratio=0.75):
        visible, mask, restore = MAE.random_masking(self, x, mask_ratio)
        return restore.argsort(1)[:, : visible.shape[1]], mask, restore

    def mask(self, x, mask_ratio, noise):
        keep, mask, restore = self.random_masking(x) if mask_ratio == 0.75 else self.random_masking(x, mask_ratio)
        return x.gather(1, keep[..., None].expand(-1, -1, x.shape[2])), mask, restore


class Inverted(Host):
    """A bool mask that is True where a patch stays."""

    def random_masking(self, x, mask_ratio):
        visible, mask, restore = MAE.random_masking(self, x, mask_ratio)
        return visible, mask == 0, restore

    def mask(self, x, mask_ratio, noise):
        visible, kept, restore = self.random_masking(x, mask_ratio)
        return visible, 1 - kept.float(), restore


HOSTS = [MAE, Pixio, Prithvi, MAEst, ConvMAE, Inverted]


def loss_of(model, images, seed=1):
    torch.manual_seed(seed)
    loss, _, mask = model(images)
    return loss.detach(), mask


@pytest.mark.parametrize("host", HOSTS)
def test_the_same_draws_give_the_same_loss(monkeypatch, host):
    model, images, noise = host(), torch.randn(3, 3, 64, 64), torch.rand(3, 64)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: noise)
        expected = loss_of(model, images)
    monkeypatch.setattr(RandomMask, "draw", lambda *_, **__: noise)
    evolution = apply_to_mae(model, RandomMask())
    for _ in range(2):
        loss, mask = loss_of(model, images)
        assert torch.equal(loss, expected[0])
        assert torch.equal(mask, expected[1])
    assert torch.equal(evolution.last_mask, mask)


@pytest.mark.parametrize("host", HOSTS)
def test_a_teacher_reads_all_patches(host):
    model, images = host(), torch.randn(2, 3, 64, 64)
    teacher = make_teacher(model, layers="tokens")  # blocks without a class token attend otherwise
    parts = teacher(images)
    assert torch.equal(parts, make_teacher(MAE(), layers="tokens")(images))
    evolution = apply_to_mae(model, EvolvingMask(10), teacher).set_epoch(5)
    model(images)
    assert torch.equal(evolution.last_parts, teacher(images))
    assert torch.equal(make_teacher(model, layers="tokens")(images), parts)


def test_noise_is_the_hosts_own_mask():
    model, images, noise = Prithvi().eval(), torch.randn(3, 3, 64, 64), torch.rand(3, 64)
    expected = model.forward_encoder(images, 0.75, noise)
    apply_to_mae(model, RandomMask())
    assert all(map(torch.equal, model.forward_encoder(images, 0.75, noise), expected))
    assert not torch.equal(model.forward_encoder(images, 0.75)[1], expected[1])


def test_what_is_unknown_is_refused_at_once():
    class Odd(MAE):
        def random_masking(self, x, mask_ratio):
            return (*MAE.random_masking(self, x, mask_ratio), torch.rand(x.shape[:2]))

    with pytest.raises(TypeError, match=r"returns \[\[2, 16, 2\], \[2, 64\], \[2, 64\], \[2, 64\]\].*ids_restore"):
        apply_to_mae(Odd(), RandomMask())

    class NoRatio(MAE):
        def random_masking(self, x, noise=None):
            return MAE.random_masking(self, x, 0.75)

    with pytest.raises(TypeError, match=r"random_masking\(x, noise=None\) has no argument for the mask ratio"):
        apply_to_mae(NoRatio(), RandomMask())


X = torch.arange(96.0).view(2, 48, 1)


def returning(*names):
    def random_masking(x, mask_ratio):
        ids_shuffle = torch.rand(x.shape[:2]).argsort(1)
        ids_restore, keep = ids_shuffle.argsort(1), int(x.shape[1] * (1 - mask_ratio))
        known = {"ids_shuffle": ids_shuffle, "ids_restore": ids_restore, "mask": ids_restore >= keep}
        known |= {"ids_keep": ids_shuffle[:, :keep], "ids_mask": ids_shuffle[:, keep:]}
        return tuple(known[name] for name in names)

    return random_masking


@pytest.mark.parametrize("names", [("mask", "ids_restore"), ("ids_mask", "ids_keep", "ids_shuffle")])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7])
def test_any_order_is_recognised(names, ratio):
    found = learn_results(lambda: returning(*names)(X, ratio), X)
    assert [result.name for result in found] == list(names)


def test_two_that_cannot_be_told_apart_are_refused():
    with pytest.raises(TypeError, match="ids_restore or ids_keep among them"):
        learn_results(lambda: returning("ids_shuffle", "ids_restore")(X, 0.5), X)
