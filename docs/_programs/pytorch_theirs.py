"""A classifier of images in PyTorch."""

# define
import torch
from torch import nn


def make(rate=0.0):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(rate),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


# initialise
torch.manual_seed(0)
net = make()


# call
def predict(net, x):  # (N, C, H, W)
    net.eval()
    with torch.no_grad():
        return net(x)


# read
weight = net[0].weight
names = [name for name, _ in net.named_parameters()]


# train
def train(net, x, labels, steps=5):
    net.train()
    trained = [q for q in net.parameters() if q.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# freeze
def train_head(net, x, labels):
    for name, parameter in net.named_parameters():
        parameter.requires_grad = name.startswith("6.")
    return train(net, x, labels)


# tie
class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 11, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens):
        h = torch.tanh(self.body(self.embed(tokens)))
        return self.decoder(h)


language = Language()


# save
def save_and_load(path, net):
    torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path))


# end
