"""The README's code runs as it stands."""

import re
from pathlib import Path

import torch
from vits import MAE

README = Path(__file__).parents[1] / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_three_lines_make_an_mae_evolve():
    torch.manual_seed(0)
    model = MAE()
    names = {"model": model, "epochs": 4, "epoch": 1, "images": torch.randn(2, 3, 64, 64)}
    before, *lines = re.split(r"\n# \d\. .*\n", blocks()[0])
    assert len(lines) == 3
    exec(before, names)
    exec(lines[0], names)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    removed = []
    for epoch in range(4):
        names["epoch"] = epoch
        exec(lines[1], names)
        latent, mask, ids_restore = model.forward_encoder(names["images"], 0.75)
        assert latent.shape[1] == 1 + 16
        assert torch.equal(mask, (ids_restore >= 16).float())
        removed.append(mask)
        latent.square().mean().backward()
        optimizer.step()
        exec(lines[2], names)
    assert names["masking"].alpha == 1
    assert names["teacher"].model.n_averaged == 4
    assert not torch.equal(removed[0], removed[-1])


def test_the_other_examples_run():
    names = {}
    for block in blocks()[1:]:
        exec(block, names)
    assert names["visible"].shape == (8, 49, 768)
    assert names["parts"].shape == (8, 196)
    assert names["parts"].max() < 10
