"""Copy networks with their memory, so that running a copy reaches nothing of the network."""

import torch
from torch import Tensor, nn

from selab.meta.twin import Copier


class OwnMemory:
    """Return the copy of a tensor, in memory of its own; views and tied tensors stay views and tied.

    Args:
        device: of the copies; None for that of each tensor.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = None if device is None else torch.device(device)
        # Real storage → (the tensor, so that the storage lives; its copy).
        self._copied: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return the copy of one tensor; a parameter's copy is a parameter, and nothing has a history of autograd."""
        plain = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided
        if not plain or x.is_quantized or x.is_conj() or x.is_neg():
            made = x.detach().clone() if self._device is None else x.detach().to(self._device, copy=True)
        else:
            place = x.device if self._device is None else self._device
            made = torch.empty(0, dtype=x.dtype, device=place)
            made.set_(self._storage(x, place), x.storage_offset(), x.shape, x.stride())
        if isinstance(x, nn.Parameter):
            return nn.Parameter(made, x.requires_grad)
        return made.requires_grad_(x.requires_grad) if made.is_floating_point() or made.is_complex() else made

    def _storage(self, x: Tensor, place: torch.device) -> torch.UntypedStorage:
        storage = x.untyped_storage()
        found = self._copied.get(storage._cdata)
        if found is None:
            # A storage is copied as bytes: the tensor on it may be a view of a part.
            held = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
            found = self._copied[storage._cdata] = (x, held.to(place, copy=True).untyped_storage())
        return found[1]


def real_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network with memory of its own, which runs as the network does, compiled or scripted.

    Unlike those of `copy.deepcopy`, its functions (a `forward` that was set, hooks) run the copy's modules, and
    non-leaf tensors, locks and open files are no obstacle; the last two are shared.
    """
    made: nn.Module = Copier(OwnMemory(), as_written=False)(model)
    return made
