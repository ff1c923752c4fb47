"""Programs in MXNet Gluon, which is shown and not run: what it computed is recorded in tests/data."""

# define
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

net = nn.HybridSequential()
net.add(
    nn.Conv2D(8, kernel_size=3, padding=1, activation="relu"),
    nn.BatchNorm(),
    nn.MaxPool2D(),
    nn.Conv2D(6, kernel_size=3, strides=2, use_bias=False),
    nn.BatchNorm(scale=False),
    nn.Activation("relu"),
    nn.GlobalAvgPool2D(),
    nn.Flatten(),
    nn.Dense(10),
)

# initialise
net.initialize(init=init.Xavier())

# call
x = nd.random.uniform(shape=(2, 3, 12, 12))  # (N, C, H, W)
y = net(x)  # the first call makes the parameters

# read
weight = net[0].weight.data()
named = net.collect_params(".*weight")
bias = net.collect_params()["dense0_bias"].data()

# set
net.initialize(init=init.Normal(sigma=0.01), force_reinit=True)
net[0].initialize(init=init.Xavier(), force_reinit=True)
net[8].bias.set_data(net[8].bias.data() + 1)

# train
loss = gluon.loss.SoftmaxCrossEntropyLoss()
trainer = gluon.Trainer(
    net.collect_params(), "sgd", {"learning_rate": 0.1}
)


def step(x, labels):
    with autograd.record():
        value = loss(net(x), labels).mean()
    value.backward()
    trainer.step(batch_size=1)
    return value


# freeze
for parameter in net[:8].collect_params().values():
    parameter.grad_req = "null"

# tie
tied = nn.Sequential()
shared = nn.Dense(8, activation="relu")
tied.add(
    nn.Dense(8, activation="relu"),
    shared,
    nn.Dense(8, activation="relu", params=shared.params),
    nn.Dense(10),
)

# save
net.save_parameters("convbn.params")
net.load_parameters("convbn.params")


# block
class Centered(gluon.nn.Block):
    def __init__(self):
        super().__init__()
        self.dense = nn.Dense(10)
        with self.name_scope():
            self.scale = self.params.get("scale", shape=(1,))

    def forward(self, x):
        return self.dense(x - x.mean()) * self.scale.data()


# end
