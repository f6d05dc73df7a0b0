"""Small random networks from a grammar, described by plain data that hypothesis draws, shrinks and prints."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import selab

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(),
    "relu_": lambda: nn.ReLU(inplace=True),
    "silu": lambda: nn.SiLU(),
    "hardswish": lambda: nn.Hardswish(),
    "gelu": lambda: nn.GELU(),
    "leaky_": lambda: nn.LeakyReLU(0.1, inplace=True),
    "dropout": lambda: nn.Dropout(0.5),
    "identity": lambda: nn.Identity(),
}
NORMS = {
    "batch": lambda c: nn.BatchNorm2d(c),
    "batch_no_affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "batch_no_stats": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "group": lambda c: nn.GroupNorm(2, c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
}
POOLS = {
    "max": lambda: nn.MaxPool2d(3, 1, 1),
    "avg": lambda: nn.AvgPool2d(3, 1, 1),
    "avg_inside": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((5, 4)),
    "max_ceil": lambda: nn.MaxPool2d(2, 1, ceil_mode=True),
    "power": lambda: nn.LPPool2d(2, 2, 1),
}
CONVS = (
    "plain",
    "pointwise",
    "depthwise",
    "grouped",
    "dilated",
    "asymmetric",
    "same",
    "reflect",
    "no_bias",
    "transposed",
)
FUNCTIONS = {
    "nearest": lambda x: F.interpolate(x, scale_factor=1.5),
    "bilinear": lambda x: F.interpolate(x, size=(6, 7), mode="bilinear"),
    "pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "flip": lambda x: x.flip(3),
    "shuffle": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transpose": lambda x: x.transpose(2, 3),
    "softmax": lambda x: x.softmax(1),
    "times": lambda x: x * 1.5 + 0.25,
    "crop": lambda x: x[:, :, : max(1, x.shape[2] - 1)],
    "clamp": lambda x: x.clamp(-1, 1),
}
JOINS = {
    "add": lambda a, b: a + b,
    "torch.add": lambda a, b: torch.add(a, b, alpha=0.5),
    "in_place": lambda a, b: a.add_(b) if not a.requires_grad else a + b,
    "relu_in_place": lambda a, b: (a + b).relu_(),
    "sum": lambda a, b: sum([a, b]),
    "addcmul": lambda a, b: torch.addcmul(b, a, torch.full_like(a[:1, :, :1, :1], 0.5)),
    "times": lambda a, b: a * b,
    "maximum": lambda a, b: torch.maximum(a, b),
}


def conv(kind, c_in, c_out):
    """Return a convolution that keeps height and width."""
    match kind:
        case "pointwise":
            return nn.Conv2d(c_in, c_out, 1)
        case "depthwise":
            return nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in)
        case "grouped":
            return nn.Conv2d(c_in, c_out, 3, padding=1, groups=2)
        case "dilated":
            return nn.Conv2d(c_in, c_out, 3, padding=2, dilation=2)
        case "asymmetric":
            return nn.Conv2d(c_in, c_out, (1, 3), padding=(0, 1))
        case "same":
            return nn.Conv2d(c_in, c_out, 3, padding="same")
        case "circular":
            return nn.Conv2d(c_in, c_out, 3, padding=1, padding_mode="circular")
        case "no_bias":
            return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        case "transposed":
            return nn.ConvTranspose2d(c_in, c_out, 3, padding=1)
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class Function(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return FUNCTIONS[self.name](x)


class Join(nn.Module):
    """A block with a branch and the map itself; `late` keeps the map in a local variable that is read afterwards."""

    def __init__(self, body, how, late):
        super().__init__()
        self.body, self.how, self.late = body, how, late

    def forward(self, x):
        y = self.body(x)
        if self.late:
            z = JOINS[self.how](y.clone(), x)
            return z + y.mean()
        return JOINS[self.how](y, x)


class Concatenation(nn.Module):
    def __init__(self, *bodies):
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x):
        return torch.cat([body(x) for body in self.bodies], 1)


class Gate(nn.Module):
    """Channel attention as people write it by hand, with its input in a local variable."""

    def __init__(self, c, spelling):
        super().__init__()
        self.fc1, self.fc2, self.spelling = nn.Linear(c, max(1, c // 2)), nn.Linear(max(1, c // 2), c), spelling

    def forward(self, x):
        s = x.mean((2, 3)) if self.spelling == "mean" else F.adaptive_avg_pool2d(x, 1).flatten(1)
        s = torch.sigmoid(self.fc2(F.relu(self.fc1(s))))
        return x * s[:, :, None, None] if self.spelling == "mean" else x.mul(s.view(*s.shape, 1, 1).expand_as(x))


class Attention(nn.Module):
    """Self-attention over positions."""

    def __init__(self, c, spelling):
        super().__init__()
        self.qkv, self.out, self.spelling = nn.Linear(c, 3 * c), nn.Linear(c, c), spelling

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if self.spelling == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


class Layer(nn.Module):
    """Convolution, normalisation and activation in one of the usual spellings; every local name is a map."""

    def __init__(self, c_in, kind, norm, act, spelling):
        super().__init__()
        self.conv, self.spelling = conv(kind, c_in, c_in), spelling
        self.bn, self.act = NORMS[norm](c_in), ACTIVATIONS[act]()
        self.taps = False

    def forward(self, x):
        if self.spelling == "reused":
            x = self.conv(x)
            x = self.bn(x)
            return self.act(x)
        if self.spelling == "nested":
            return self.act(self.bn(self.conv(x)))
        c = self.conv(x)
        n = self.bn(c)
        if self.spelling == "early":
            # The activation may be in place, so what is kept is kept as a copy.
            kept = n.clone()
            return self.act(n) + 0.5 * kept
        a = self.act(n)
        return torch.cat([a, c.detach()], 1)[:, : a.shape[1]]


class Excited(nn.Module):
    """A layer with a block of selab, whose forward reads the map before the block again, or not."""

    def __init__(self, c, norm, act, spelling):
        super().__init__()
        self.conv, self.bn, self.act = conv("plain", c, c), NORMS[norm](c), ACTIVATIONS[act]()
        self.se, self.spelling = selab.SqueezeExcitation(c, 2), spelling
        self.kept = []

    def forward(self, x):
        if self.spelling == "reused":
            y = self.act(self.bn(self.conv(x)))
            y = self.se(y)
            return y + x if y.shape == x.shape else y
        if self.spelling == "view":
            y = self.act(self.bn(self.conv(x)))
            first = y[:, :1]
            return self.se(y) + first
        y = self.bn(self.conv(x))
        if self.spelling == "kept":
            self.kept = [y]
            z = self.se(y)
            return z + self.kept.pop()
        z = self.se(y)
        # The trace of an image sees the other way.
        return z + y if self.spelling == "read" or x.shape[0] > 1 else z


class Network(nn.Module):
    """What a description stands for; with `taps` the forward also returns the map before every part."""

    def __init__(self, parts, c, head):
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.parts = nn.ModuleList(parts)
        self.head = nn.Linear(c, 4) if head == "linear" else nn.Conv2d(c, 4, 1)

    def forward(self, x, taps=False):
        kept = []
        x = self.stem(x)
        for part in self.parts:
            if taps:
                kept.append(x)
            x = part(x)
        x = self.head(x.mean((2, 3))) if isinstance(self.head, nn.Linear) else self.head(x).mean((2, 3))
        return (x, kept) if taps else x


def _made(part, c):
    kind, *words = part
    match kind:
        case "conv":
            return conv(words[0], c, c)
        case "norm":
            return NORMS[words[0]](c)
        case "act":
            return ACTIVATIONS[words[0]]()
        case "pool":
            return POOLS[words[0]]()
        case "function":
            return Function(words[0])
        case "gate":
            return Gate(c, words[0])
        case "attention":
            return Attention(c, words[0])
        case "layer":
            return Layer(c, *words)
        case "excited":
            return Excited(c, *words)
        case "sequence":
            return nn.Sequential(*(_made(one, c) for one in words[0]))
        case "join":
            return Join(nn.Sequential(*(_made(one, c) for one in words[0])), words[1], words[2])
        case "concatenation":
            # A pointwise convolution afterwards restores the number of channels.
            bodies = [nn.Sequential(*(_made(one, c) for one in body)) for body in words[0]]
            return nn.Sequential(Concatenation(*bodies), nn.Conv2d(c * len(bodies), c, 1))
    raise ValueError(kind)


def network(description):
    """Build a network in eval mode with random weights and statistics, the same at each call."""
    c, parts, head = description
    torch.manual_seed(0)
    model = Network([_made(part, c) for part in parts], c, head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


# Parts that keep the shape of their map, for branches.
_keeping = st.one_of(
    st.tuples(st.just("conv"), st.sampled_from(CONVS)),
    st.tuples(st.just("norm"), st.sampled_from(sorted(NORMS))),
    st.tuples(st.just("act"), st.sampled_from(sorted(ACTIVATIONS))),
    st.tuples(st.just("pool"), st.sampled_from(["max", "avg", "avg_inside"])),
    st.tuples(st.just("function"), st.sampled_from(["flip", "shuffle", "channels_last", "softmax", "times", "clamp"])),
    st.tuples(st.just("gate"), st.sampled_from(["mean", "pool"])),
    st.tuples(
        st.just("layer"),
        st.sampled_from(CONVS),
        st.sampled_from(sorted(NORMS)),
        st.sampled_from(["relu", "relu_", "silu", "hardswish", "identity"]),
        st.sampled_from(["reused", "nested", "early", "late"]),
    ),
)
_excited = st.tuples(
    st.just("excited"),
    st.sampled_from(sorted(NORMS)),
    st.sampled_from(["relu", "relu_", "identity", "dropout"]),
    st.sampled_from(["reused", "view", "kept", "read", "of_size"]),
)
_body = st.lists(_keeping, min_size=1, max_size=4).map(tuple)
_changing = st.one_of(
    st.tuples(st.just("pool"), st.sampled_from(["adaptive", "max_ceil", "power"])),
    st.tuples(st.just("function"), st.sampled_from(["nearest", "bilinear", "pad", "transpose", "crop"])),
)
_part = st.one_of(
    _keeping,
    _changing,
    st.tuples(st.just("attention"), st.sampled_from(["fused", "written"])),
    _excited,
    st.tuples(st.just("sequence"), _body),
    st.tuples(st.just("join"), _body, st.sampled_from(sorted(JOINS)), st.booleans()),
    st.tuples(st.just("concatenation"), st.lists(_body, min_size=2, max_size=3).map(tuple)),
)
descriptions = st.tuples(
    st.sampled_from([4, 8]), st.lists(_part, min_size=1, max_size=5).map(tuple), st.sampled_from(["linear", "conv"])
)
