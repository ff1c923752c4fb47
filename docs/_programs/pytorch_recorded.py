"""What pytorch_theirs.py computes: recorded, as PyTorch is not needed to read these pages.

Run ``python docs/_programs/pytorch_recorded.py`` with PyTorch to record again.
"""

import copy
from pathlib import Path

import numpy as np

from images import labels, tokens, x

FOLDER = Path(__file__).resolve().parent / "pytorch_recorded"


def run(folder):
    """Runs the program, and writes its checkpoints and numbers."""
    import torch

    import pytorch_theirs as theirs

    batch = torch.tensor(x), torch.tensor(labels)
    numbers = {"output": theirs.predict(theirs.net, batch[0]).numpy()}
    torch.save(theirs.net.state_dict(), folder / "start.pth")
    for name in ("train", "train_head"):
        net = copy.deepcopy(theirs.net)
        numbers[f"{name}_losses"] = getattr(theirs, name)(net, *batch)
        torch.save(net.state_dict(), folder / f"{name}.pth")
    torch.save(theirs.language.state_dict(), folder / "tied.pth")
    loss = (theirs.language(torch.tensor(tokens)) ** 2).mean()
    loss.backward()
    numbers["tied_loss"] = loss.item()
    for name, parameter in theirs.language.named_parameters():
        numbers[f"gradient.{name}"] = parameter.grad.numpy()
    np.savez(folder / "numbers.npz", **numbers)


def numbers():
    """Returns what was recorded."""
    return np.load(FOLDER / "numbers.npz")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    run(FOLDER)
