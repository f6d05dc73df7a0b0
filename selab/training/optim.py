"""Optimizer, initial weights and moving average of a recipe."""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selab.attention.gated_site import named_sites, sites_own
from selab.training.recipe import Recipe

# Of Keras 2: keras/optimizers.py, RMSprop(rho=0.9), and its backend's epsilon.
_KERAS_RHO, _KERAS_EPSILON = 0.9, 1e-7
# The same file: Adam(beta_2=0.999).
_KERAS_BETA_2 = 0.999


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer for a model's parameters; the learning rate is set before every step.

    Where the recipe says so, one-dimensional parameters (biases, and scales and shifts of normalisation layers) have no
    weight decay.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.decay_norm_and_bias:
        groups: list[dict[str, Any]] = [{"params": parameters}]
    else:
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            groups,
            lr=recipe.lr,
            alpha=_KERAS_RHO,
            eps=_KERAS_EPSILON,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
    if recipe.optimizer == "adam":
        return torch.optim.Adam(
            groups,
            lr=recipe.lr,
            betas=(recipe.beta1, _KERAS_BETA_2),
            eps=_KERAS_EPSILON,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        # One kernel for all parameters: four times as fast as the others on a CPU, without synchronising a GPU.
        fused=True,
    )


def draw_he(model: nn.Module, *, seed: int, only: Collection[str]) -> None:
    """Draw the weights of convolutions and fully connected layers from N(0, 2 / fan_in); set their biases to 0.

    Each layer has its own generator, seeded from the seed and the layer's name. Networks that share a layer therefore
    share its values, whatever other layers they have.

    Args:
        model: on the CPU.
        seed: of all layers.
        only: keys of the state dict; other layers keep their values.

    Source: He et al. 2015, arXiv 1502.01852, eq. 10.
    """
    generator = torch.Generator()
    for name, site in named_sites(model):
        module = sites_own(site)
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear) or f"{name}.weight" not in only:
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little"))
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Average:
    """decay * average + (1 - decay) * weights after each step, of parameters and running statistics alike.

    Source: Szegedy et al. 2015, arXiv 1512.00567, Sec. 8.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        # A state dict's tensors are the model's own memory, without gradients.
        self._live = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
        self.state = {key: value.clone() for key, value in self._live.items()}

    def update(self) -> None:
        """Add the present weights to the average."""
        torch._foreach_lerp_(list(self.state.values()), list(self._live.values()), 1 - self._decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Load a saved average."""
        for key, value in self.state.items():
            value.copy_(state[key])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the weights by their average inside the body, for testing and saving."""
        kept = {key: value.clone() for key, value in self._live.items()}
        for key, value in self._live.items():
            value.copy_(self.state[key])
        try:
            yield
        finally:
            for key, value in self._live.items():
                value.copy_(kept[key])
