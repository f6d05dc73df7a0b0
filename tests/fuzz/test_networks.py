"""Random networks: counting, inserting, removing, fusing, copying and exporting agree with plain PyTorch.

The number of networks is 100, or SELAB_FUZZ of the environment (`nox -s fuzz`). A network that fails is printed as the
description that `random_networks.network` builds it from.
"""

import copy
import io
import os
import random
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from random_networks import descriptions, network
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import selab
from selab.attention.insert import inserted_blocks

EXAMPLES = int(os.environ.get("SELAB_FUZZ", "100"))
SIZE = (2, 3, 9, 8)
ORDINARY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SELAB_FUZZ" not in os.environ,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example():
    torch.manual_seed(1)
    return torch.randn(SIZE)


def run(model, *args, **kwargs):
    """Run without gradients; as tensors that nothing changes any more."""
    with torch.no_grad():
        out = model(*args, **kwargs)
    return out.clone() if isinstance(out, torch.Tensor) else [out[0].clone(), *(one.clone() for one in out[1])]


def everything(model):
    """Return what a network is: its tensors by name, identity, version and values, and the text of its structure."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = [(name, id(x), x._version, x.requires_grad, x.detach().clone()) for name, x in named]
    modes = [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()]
    return tensors, modes, str(model)


def assert_unchanged(before, after):
    (tensors, *rest), (tensors_after, *rest_after) = before, after
    assert rest == rest_after
    assert [one[:-1] for one in tensors] == [one[:-1] for one in tensors_after]
    assert all(torch.equal(a[-1], b[-1]) for a, b in zip(tensors, tensors_after, strict=True))


def close(got, expected, what, tolerance=2e-4):
    if isinstance(expected, list):
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            close(a, b, f"{what}, map {index}", tolerance)
        return
    assert got.shape == expected.shape, what
    near = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(got, expected, **near, msg=lambda message: f"{what}: {message}")


def sites(model):
    """Return the modules that run once on a map (N, C, H, W), by plain hooks."""
    calls, shapes, hooks = {}, {}, []
    for path, module in model.named_modules():
        if path:

            def saw(_module, _args, out, path=path):
                calls[path] = calls.get(path, 0) + 1
                shapes[path] = tuple(out.shape) if isinstance(out, torch.Tensor) else ()

            hooks.append(module.register_forward_hook(saw))
    run(model, example())
    for hook in hooks:
        hook.remove()
    inside = [path for path, module in model.named_modules() if isinstance(module, selab.Attention)]
    return [
        path
        for path, count in calls.items()
        if count == 1
        and len(shapes[path]) == 4
        and not any(f"{path}.".startswith(f"{block}.") for block in inside)
        # A map of fewer than four channels is narrower than the reduction.
        and shapes[path][1] >= 4
    ]


def some_sites(model, seed, *, most):
    found = sites(model)
    chosen = random.Random(seed).sample(found, min(len(found), most))
    note(f"sites {chosen}")
    return chosen


def trains(description):
    """Return whether PyTorch has gradients of the network: it has none where a map that they need is overwritten."""
    try:
        network(description)(example()).sum().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return False
    return True


def flops_by_torch(model, x, *, backward):
    counter = FlopCounterMode(display=False)
    # It does not know the attention that torch 2.13 runs on a CPU, only the products of the separate operators.
    with counter, sdpa_kernel(SDPBackend.MATH):
        out = model(x)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------ counting
@ORDINARY
@given(description=descriptions)
def test_count_agrees_with_torch_and_changes_nothing(description):
    model, x = network(description), example()
    expected = run(model, x)
    before = everything(model)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    cost = selab.count(model, SIZE)
    assert_unchanged(before, everything(model))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert torch.equal(run(model, x), expected)
    assert cost.unknown == {}
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert 2 * cost.macs.conv_linear == flops_by_torch(model, x, backward=False)
    grouped = any(getattr(module, "groups", 1) > 1 for module in model.modules())
    if not grouped and trains(description):
        # torch 2.13's counter multiplies the gradients of grouped convolutions by their groups.
        both = flops_by_torch(model, x, backward=True)
        assert 2 * (cost.macs.conv_linear + cost.macs_backward.conv_linear) == both


# ----------------------------------------------------------------------------------------- inserting, removing, storing
@ORDINARY
@given(description=descriptions, seed=st.integers(0, 9))
def test_inserted_blocks_gate_their_sites_and_leave_with_no_trace(description, seed):
    model, x = network(description), example()
    expected, before, keys = run(model, x, taps=True), everything(model), list(model.state_dict())
    chosen = some_sites(model, seed, most=3)
    if not chosen:
        return
    same = network(description)
    selab.insert_se(same, chosen, input_nchw=SIZE, reduction=2, init="identity")
    close(run(same, x, taps=True), by_copies(network(description), chosen, x), "identity")

    inserted = selab.insert_se(model, chosen, input_nchw=SIZE, reduction=2)
    assert sorted(one.path for one in inserted) == sorted(chosen)
    assert [key for key in model.state_dict() if key in set(keys)] == keys
    assert set(chosen) <= set(selab.check_inserted(model, input_nchw=SIZE))

    randomise(model)
    gated = run(model, x, taps=True)
    close(gated, by_hooks(network(description), model, chosen, x), "as plain PyTorch computes it")
    twin = copy.deepcopy(model)
    close(run(twin, x, taps=True), gated, "deepcopy", 0)
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)
    kept.seek(0)
    fresh = network(description)
    selab.insert_se(fresh, chosen, input_nchw=SIZE, reduction=2)
    fresh.load_state_dict(torch.load(kept, weights_only=True))
    close(run(fresh, x, taps=True), gated, "state dict", 0)

    bare = selab.count(network(description), SIZE)
    cost = selab.count(model, SIZE)
    added = sum(one.params for one in inserted)
    assert cost.params - bare.params == added == cost.se.params - bare.se.params
    assert cost.unknown == {}

    assert selab.remove_se(model) == len(chosen)
    close(run(model, x, taps=True), expected, "removed", 0)
    assert_unchanged(before, everything(model))


def randomise(model):
    """Give the blocks weights with which they change their maps."""
    torch.manual_seed(2)
    for _, block in inserted_blocks(model).values():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.7)


def by_copies(plain, chosen, x):
    """Run the network with copies of its sites' outputs.

    A block returns a new map. Where a site returns its input itself, as Dropout does in inference, a later layer that
    works in place therefore leaves that input as it was.
    """
    for site in chosen:
        plain.get_submodule(site).register_forward_hook(lambda _module, _args, out: out.clone())
    return run(plain, x, taps=True)


def by_hooks(plain, gated, chosen, x):
    """Run the network with its sites gated by hooks that spell SE out."""
    blocks = dict(inserted_blocks(gated).values())
    for site in chosen:
        weights = {name: p.detach() for name, p in blocks[site].named_parameters()}

        def gate(_module, _args, out, weights=weights):
            s = out.mean((2, 3))
            s = torch.relu(nn.functional.linear(s, weights["fc1.weight"].flatten(1), weights.get("fc1.bias")))
            s = torch.sigmoid(nn.functional.linear(s, weights["fc2.weight"].flatten(1), weights.get("fc2.bias")))
            return out * s[:, :, None, None]

        plain.get_submodule(site).register_forward_hook(gate)
    return run(plain, x, taps=True)


# -------------------------------------------------------------------------------------------------------------- fusing
@ORDINARY
@given(description=descriptions, seed=st.integers(0, 9))
def test_fused_networks_compute_the_same_on_every_path(description, seed):
    model, x = network(description), example()
    bare = run(model, x, taps=True)
    chosen = some_sites(model, seed, most=3)
    if chosen:
        selab.insert_se(model, chosen, input_nchw=SIZE, reduction=2)
        randomise(model)
    expected, plain = run(model, x, taps=True), run(model, x)
    fused = copy.deepcopy(model)
    selab.fuse(fused, input_nchw=(1, *SIZE[1:]))
    for turn in ("first", "second"):
        close(run(fused, x), plain, f"{turn} call")
        # The trace went the other way, on which no map before a part is returned.
        close(run(fused, x, taps=True), expected, f"{turn} call with maps")
    assert list(fused.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(fused)
    close(run(twin, x, taps=True), expected, "deepcopy")
    selab.remove_se(twin)
    if chosen:
        close(run(twin, x, taps=True), bare, "fused and removed", 0)
    assert list(twin.state_dict()) == list(network(description).state_dict())

    if not trains(description):
        return
    for mode in (False, True):
        gradients = []
        for one in (model, fused):
            one.train(mode).zero_grad()
            torch.manual_seed(3)
            one(x).square().sum().backward()
            gradients.append([p.grad for p in one.parameters()])
            one.eval()
        for (name, _), got, right in zip(model.named_parameters(), gradients[1], gradients[0], strict=True):
            assert (got is None) == (right is None), name
            if right is not None:
                scale = float(right.abs().max()) + 1e-3
                close(got / scale, right / scale, f"gradient of {name}, train mode {mode}", 2e-3)


@pytest.mark.slow
@settings(ORDINARY, max_examples=max(1, EXAMPLES // 20))
@given(description=descriptions, seed=st.integers(0, 9), fuse=st.booleans())
def test_exported_networks_compute_the_same(description, seed, fuse):
    model, x = network(description), example()
    chosen = some_sites(model, seed, most=2)
    if chosen:
        selab.insert_se(model, chosen, input_nchw=SIZE, reduction=2)
        randomise(model)
    expected = run(model, x)
    if fuse:
        selab.fuse(model, input_nchw=SIZE)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,))
    close(run(program.module(), x), expected, "exported")
