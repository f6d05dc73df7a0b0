"""Where training scripts put a network's tensors, and how they call them: found, reported, or refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from selab.models.checkpoint import WeightsError, load, read_state


class Net(nn.Module):
    """A small network with a BN, of some classes."""

    def __init__(self, classes=3, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


def state_of(seed, **options):
    torch.manual_seed(seed)
    state = Net(**options).state_dict()
    drawn = {
        key: torch.randn_like(value) if value.is_floating_point() else value + seed for key, value in state.items()
    }
    return {key: value.abs() if key.endswith("running_var") else value for key, value in drawn.items()}


GOOD, OTHER = state_of(1), state_of(2)


def under(prefix, state=GOOD):
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture
def saved(tmp_path):
    def save(content, name="in.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def holds(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


LAYOUTS = {
    "plain": (GOOD, ""),
    "DataParallel": (under("module."), "prefix module. removed"),
    "compiled": (under("_orig_mod."), "prefix _orig_mod. removed"),
    "compiled, in DDP": (under("module._orig_mod."), "prefix module._orig_mod. removed"),
    "in DDP, compiled": (under("_orig_mod.module."), "prefix _orig_mod.module. removed"),
    "a compiled child": (
        {key.replace("conv.", "conv._orig_mod."): value for key, value in GOOD.items()},
        "prefix _orig_mod. removed",
    ),
    "FSDP": (under("_fsdp_wrapped_module."), "prefix _fsdp_wrapped_module. removed"),
    "torchvision": ({"model": GOOD, "epoch": 3}, "taken from model; left out: epoch"),
    "timm": ({"state_dict": GOOD, "arch": "net"}, "taken from state_dict; left out: arch"),
    "Lightning": ({"state_dict": under("model."), "epoch": 1}, "taken from state_dict; prefix model. removed"),
    "Lightning with a loss and a metric": (
        {"state_dict": {**under("net."), "loss.weight": torch.ones(3), "val_acc.total": torch.tensor(9)}},
        "taken from state_dict; prefix net. removed; left out: loss, val_acc",
    ),
    "Lightning and compiled": ({"state_dict": under("model._orig_mod.")}, "prefix model._orig_mod. removed"),
    "compiled in Lightning in DDP": (
        {"state_dict": under("module.model._orig_mod.")},
        "taken from state_dict; prefix module.model._orig_mod. removed",
    ),
    "compiled twice": (under("_orig_mod.module._orig_mod."), "prefix _orig_mod.module._orig_mod. removed"),
    "net": ({"net": under("module."), "acc": 91.2}, "taken from net; prefix module. removed; left out: acc"),
    "tutorial": ({"model_state_dict": GOOD, "optimizer_state_dict": {}}, "taken from model_state_dict"),
    "pycls": ({"model_state": GOOD, "cfg": "x"}, "taken from model_state"),
    "a folder in the file": ({"checkpoint": {"model": GOOD}}, "taken from checkpoint.model"),
    "twice the same": ({"state_dict": GOOD, "model": dict(GOOD)}, "taken from state_dict"),
}
AVERAGES = {
    "timm": {"state_dict": OTHER, "state_dict_ema": under("module.")},
    "torchvision": {"model": OTHER, "model_ema": {"n_averaged": torch.tensor(4), **under("module.")}},
    "ema": {"ema": GOOD, "model": OTHER},
    "ema_state_dict": {"ema_state_dict": GOOD, "state_dict": OTHER},
    "pycls": {"model_state": OTHER, "ema_state": GOOD},
    "BasicSR": {"params": OTHER, "params_ema": GOOD},
    "in one state dict": {"state_dict": {**under("model.", OTHER), **under("model_ema.")}},
    "ema_pytorch": {"ema": {**under("ema_model."), "step": torch.tensor(1)}, "model": OTHER},
    "ema_pytorch's both": {**under("online_model.", OTHER), **under("ema_model."), "initted": torch.tensor(1)},
    "an average of averages' state": {"model": OTHER, "ema": {"state_dict": GOOD, "decay": 0.99}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_is_found_and_what_was_taken_is_said(saved, layout):
    content, words = LAYOUTS[layout]
    model = Net()
    done = load(model, saved(content))
    assert holds(model, GOOD)
    assert words in done.words
    assert bool(words) == bool(done.words)


@pytest.mark.parametrize("layout", AVERAGES)
def test_the_average_is_chosen_unless_the_weights_are_asked_for(saved, layout):
    path = saved(AVERAGES[layout])
    for ema, state, word in ((None, GOOD, "--no-ema"), (True, GOOD, "--no-ema"), (False, OTHER, "--ema takes")):
        model = Net()
        done = load(model, path, ema=ema)
        assert holds(model, state), ema
        assert ("an average of the weights" in done.words) == (ema is not False)
        assert word in done.words


def test_torchs_own_average(saved):
    average = AveragedModel(Net())
    average.module.load_state_dict(GOOD)
    path = saved(average.state_dict())
    model = Net()
    assert "an average of the weights" in load(model, path, ema=True).words
    assert holds(model, GOOD)
    with pytest.raises(WeightsError, match="holds no weights without averaging"):
        load(model, path, ema=False)


def test_no_average_where_one_is_asked_for(saved):
    with pytest.raises(
        WeightsError, match="holds no average of the weights, only what is under state_dict; use --no-ema"
    ):
        load(Net(), saved({"state_dict": GOOD}), ema=True)
    with pytest.raises(WeightsError, match="only what is under the top level"):
        load(Net(), saved(GOOD), ema=True)


def test_an_average_of_another_form_is_left(saved):
    """Averages of keys without dots, or of parameters alone, are not the network's state dict."""
    flat = {key.replace(".", ""): value for key, value in GOOD.items()}
    model = Net()
    done = load(model, saved({"state_dict": OTHER, "ema": flat}))
    assert holds(model, OTHER)
    assert "ema" in done.words


@pytest.mark.parametrize(
    ("content", "places"),
    [
        ({"state_dict": GOOD, "model": OTHER}, "state_dict, model"),
        ({"ema": GOOD, "model_ema": OTHER, "model": OTHER}, "model_ema, ema"),
        ({"state_dict": {**under("model."), **under("net.", OTHER)}}, r"state_dict \(model\.\), state_dict \(net\.\)"),
        ({**GOOD, **under("module.", OTHER)}, r"the top level \(module\.\), the top level"),
        ({**under("module."), **GOOD, "bn.weight": OTHER["bn.weight"]}, r"the top level \(module\.\), the top level"),
        ({**under("module."), **under("module.model.", OTHER)}, r".*\(module\.model\.\), the top level \(module\.\)"),
        ({**under("model.net."), **under("model.", OTHER)}, r".*\(model\.net\.\), the top level \(model\.\)"),
        ({"state_dict": {**GOOD, **under("net.", OTHER)}}, r"state_dict \(net\.\), state_dict"),
        (
            {"state_dict": {**under("model."), **under("teacher.", OTHER)}},
            r"state_dict \(model\.\), state_dict \(teacher\.\)",
        ),
        ({"state_dict": GOOD, **OTHER}, "state_dict, the top level"),
        ({"state_dict": GOOD, "teacher": OTHER}, "state_dict, teacher"),
        ({"state_dict": GOOD, "best": {"model": under("module.", OTHER)}}, r"state_dict, best\.model \(module\.\)"),
        ({"state_dict": GOOD, "swa_weights": OTHER}, "state_dict, swa_weights"),
        ({"model_ema": GOOD, "best_ema": OTHER}, "model_ema, best_ema"),
    ],
)
def test_several_networks_are_refused_with_their_list(saved, content, places):
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=f"several networks that could be meant: {places}; save the state dict"):
        load(model, saved(content))
    assert holds(model, before)


def test_several_networks_in_memory_are_refused():
    with pytest.raises(WeightsError, match=r"the state dict: holds several networks .*the top level \(module\.\), the"):
        load(Net(), {**GOOD, **under("module.", OTHER)})


def test_the_same_network_twice_is_no_choice(saved):
    for content in ({**GOOD, **under("module.")}, {"state_dict": GOOD, "teacher": GOOD}, {"state_dict": GOOD, **GOOD}):
        model = Net()
        load(model, saved(content))
        assert holds(model, GOOD)


def test_weights_at_the_top_level_beside_their_average(saved):
    path = saved({**OTHER, **under("ema.")})
    for ema, state, words in (
        (None, GOOD, "prefix ema. removed; left out: bn, conv, fc; --no-ema takes the weights"),
        (True, GOOD, "--no-ema takes the weights"),
        (False, OTHER, "left out: ema; --ema takes the average"),
    ):
        model = Net()
        assert words in load(model, path, ema=ema).words
        assert holds(model, state), ema


def test_an_average_under_an_unusual_name_is_no_rival_of_the_weights_asked_for(saved):
    model = Net()
    load(model, saved({"state_dict": GOOD, "swa_weights": OTHER}), ema=False)
    assert holds(model, GOOD)


def test_rivals_with_a_buffer_called_as_a_counter(saved):
    model = Net()
    model.register_buffer("step", torch.tensor(0))
    own, other = {**GOOD, "step": torch.tensor(7)}, {**OTHER, "step": torch.tensor(8)}
    with pytest.raises(WeightsError, match="holds several networks"):
        load(model, saved({**own, **under("module.", other)}))


@pytest.mark.parametrize("extra", [{"module.other": torch.ones(1)}, {"teacher.fc.weight": torch.ones(3, 4)}])
def test_tensors_that_are_no_network_stay_unexpected(saved, extra):
    with pytest.raises(WeightsError, match=f"1 unexpected: {next(iter(extra))}"):
        load(Net(), saved({**GOOD, **extra}))


def test_a_part_that_does_not_fit_is_no_rival(saved):
    """An optimiser's tensors, a network of other keys, a part of the network."""
    few = {"conv.weight": GOOD["conv.weight"]}
    for beside in (
        {"optimizer": {"state": {0: few}}},
        {"teacher": {**OTHER, "more": torch.ones(1)}},
        {"best": few},
        few,
    ):
        model = Net()
        load(model, saved({"state_dict": GOOD, **beside}))
        assert holds(model, GOOD)


@pytest.mark.parametrize("average", [{"fc.bias": GOOD["fc.bias"]}, {**GOOD, "more": torch.ones(1)}])
def test_an_average_that_does_not_fit_is_named_and_not_offered(saved, average):
    path = saved({"state_dict": OTHER, "state_dict_ema": average})
    for ema in (None, False):
        model = Net()
        words = load(model, path, ema=ema).words
        assert holds(model, OTHER)
        assert words.endswith(
            "the average of the weights under state_dict_ema cannot be taken: the keys are not the network's"
        )
        assert "--ema" not in words
    with pytest.raises(WeightsError, match=r"does not fit Net: \d+ (missing|unexpected)"):
        load(Net(), path, ema=True)


def test_weights_that_do_not_fit_beside_their_average(saved):
    model = Net()
    words = load(model, saved({"state_dict_ema": GOOD, "state_dict": {"fc.bias": GOOD["fc.bias"]}})).words
    assert holds(model, GOOD)
    assert "the weights without averaging under state_dict cannot be taken" in words
    assert "--no-ema" not in words


def test_only_one_of_several_fits(saved):
    """A GAN's file, read for its discriminator."""
    model = Net()
    done = load(model, saved({"net": {"deconv.weight": torch.zeros(2)}, "model": GOOD}))
    assert holds(model, GOOD)
    assert done.words == "taken from model; left out: net"


def test_several_networks_without_one_to_compare_with(saved):
    with pytest.raises(WeightsError, match="several networks that could be meant: state_dict, model"):
        read_state(saved({"state_dict": GOOD, "model": OTHER}))
    assert read_state(saved({"state_dict": OTHER, "ema": GOOD}), ema=False).keys() == OTHER.keys()
    assert read_state(saved(under("module._orig_mod."))).keys() == GOOD.keys()
    assert read_state(saved({"state_dict": under("model.")})).keys() == GOOD.keys()
    # A network may have a child of this name.
    assert read_state(saved(under("model."))).keys() == under("model.").keys()


def test_a_network_whose_own_keys_look_wrapped(saved):
    model = nn.ModuleDict({"module": nn.ModuleDict({"model": Net()})})
    own = {f"module.model.{key}": value for key, value in GOOD.items()}
    for content in (own, under("module.", own), under("_orig_mod.", own), {"state_dict": under("model.", own)}):
        load(model, saved(content))
        assert holds(model, own)
        load(model, saved({f"module.model.{key}": value for key, value in OTHER.items()}))
        assert not holds(model, own)


def test_a_network_with_a_buffer_called_as_a_counter(saved):
    model = Net()
    model.register_buffer("step", torch.tensor(0))
    state = {**GOOD, "step": torch.tensor(7)}
    for content in (state, under("module.", state), under("_orig_mod.", state)):
        model.step.fill_(0)
        load(model, saved(content))
        assert model.step == 7


def test_a_network_that_is_wrapped_itself(saved):
    inner = Net()
    load(nn.DataParallel(inner), saved(under("module.")))
    assert holds(inner, GOOD)
    inner.load_state_dict(OTHER)
    load(torch.compile(inner), saved(GOOD))
    assert holds(inner, GOOD)
    outer = Net()
    outer.conv = torch.compile(outer.conv)
    load(outer, saved(GOOD))
    assert torch.equal(outer.conv._orig_mod.weight, GOOD["conv.weight"])


def test_a_state_dict_in_memory_has_prefixes_as_well():
    model = Net()
    assert load(model, under("module._orig_mod.")).words
    assert holds(model, GOOD)


def test_mixed_prefixes_are_refused_with_the_keys(saved):
    mixed = {(f"module.{key}" if key.startswith("conv") else key): value for key, value in GOOD.items()}
    with pytest.raises(WeightsError, match=r"2 missing: conv\.weight, conv\.bias; \d unexpected: module\.conv\.weight"):
        load(Net(), saved(mixed))


def test_two_tensors_of_one_name_are_refused(saved):
    with pytest.raises(WeightsError, match=r"two tensors for conv\.weight, one of them as conv\._orig_mod\.weight"):
        load(Net(), saved({**GOOD, "conv._orig_mod.weight": torch.zeros(4, 3, 3, 3)}))


def test_shared_tensors_arrive_in_both_places(saved):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    weight = torch.randn(3, 3)
    load(model, saved({"a.weight": weight, "a.bias": weight[0], "b.weight": weight.T, "b.bias": weight[:, 1]}))
    assert torch.equal(model["b"].weight, weight.T)
    assert torch.equal(model["b"].bias, weight[:, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_another_precision_becomes_the_networks(saved, dtype):
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in GOOD.items()}
    model = Net()
    load(model, saved(state))
    assert torch.equal(model.fc.weight, GOOD["fc.weight"].to(dtype).float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fc.bias": torch.zeros(3, dtype=torch.complex64)}, r"fc\.bias complex64 instead of float32"),
        ({"fc.bias": torch.zeros(3, dtype=torch.bool)}, r"fc\.bias bool instead of float32"),
        ({"fc.bias": torch.zeros(3).to_sparse()}, r"fc\.bias: is not a plain tensor \(sparse, quantised"),
        ({"fc.bias": torch.zeros(3, device="meta")}, "without data"),
        ({"fc._packed_params.dtype": torch.qint8}, r"fc\._packed_params\.dtype: is of type dtype, not a tensor"),
        ({"fc.bias": [0.0, 0.0, 0.0]}, r"fc\.bias: is of type list, not a tensor"),
        ({"two\nlines": torch.zeros(1)}, r"unexpected: two\\nlines"),
        ({"x" * 9999: torch.zeros(1)}, "unexpected: x{100}…"),
    ],
)
def test_other_kinds_of_tensors_are_refused_in_words(saved, change, words):
    with pytest.raises(WeightsError, match=words) as caught:
        load(Net(), saved({**GOOD, **change}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_are_refused_in_words(saved):
    state = {**GOOD, "fc.bias": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)}
    with pytest.raises(WeightsError, match=r"fc\.bias: is not a plain tensor \(sparse, quantised"):
        load(Net(), saved(state))


def test_a_modules_extra_state_is_left_out(saved):
    model = Net()
    done = load(model, saved({**GOOD, "conv._extra_state": {"scale": 1.0}}))
    assert holds(model, GOOD)
    assert done.words == "left out: conv._extra_state"


def test_a_dictionary_that_holds_itself_is_refused(saved):
    endless = {"epoch": 1}
    endless["model"] = endless["state_dict"] = endless
    with pytest.raises(WeightsError, match="has no state dict"):
        load(Net(), saved(endless))


def test_a_name_that_nobody_knows_is_named(saved):
    with pytest.raises(WeightsError, match="there are tensors under generator: save one of these alone"):
        load(Net(), saved({"generator": GOOD}))


@pytest.mark.parametrize("name", ["in.pt", "in.pth", "model_best.pth.tar", "last.ckpt", "pytorch_model.bin"])
def test_the_names_of_torch_saves_files(saved, name):
    model = Net()
    load(model, saved({"state_dict": GOOD}, name))
    assert holds(model, GOOD)


def test_safetensors_have_prefixes_as_well(tmp_path):
    save_file(under("module._orig_mod."), tmp_path / "in.safetensors")
    model = Net()
    load(model, tmp_path / "in.safetensors")
    assert holds(model, GOOD)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "in.pth").mkdir()
    with pytest.raises(WeightsError, match="not a regular file"):
        load(Net(), tmp_path / "in.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_before_anything_changes(saved, value):
    state = {key: tensor.clone() for key, tensor in GOOD.items()}
    state["conv.weight"][0] = value
    model = Net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"conv\.weight: holds NaN or infinite values"):
        load(model, saved(state))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_variance_below_zero_is_refused_before_anything_changes(saved):
    model = Net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {**GOOD, "bn.running_var": torch.tensor([1.0, -0.5, 1.0, 1.0])}
    with pytest.raises(WeightsError, match=r"bn\.running_var: holds negative values, and a variance has none"):
        load(model, saved(state))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_values_that_the_networks_type_cannot_hold_are_refused(saved):
    state = {**GOOD, "fc.bias": torch.full((3,), 1e300, dtype=torch.float64)}
    with pytest.raises(WeightsError, match=r"fc\.bias: holds NaN or infinite values"):
        load(Net(), saved(state))
    load(Net().double(), saved(state))


class TestHead:
    def test_keep_says_what_to_do(self, saved):
        with pytest.raises(WeightsError, match=r"has 10 classes, this network 3: build it with 10 classes, or leave"):
            load(Net(), saved(state_of(3, classes=10)))

    def test_drop_leaves_the_classifier_alone(self, saved):
        model, theirs = Net(), state_of(3, classes=10)
        own = model.fc.weight.clone()
        done = load(model, saved({"state_dict": under("module.", theirs)}), head="drop")
        assert torch.equal(model.fc.weight, own)
        assert torch.equal(model.conv.weight, theirs["conv.weight"])
        assert done.dropped == ("fc.weight", "fc.bias")
        assert "classifier left as initialised: fc.weight, fc.bias" in done.words

    def test_drop_changes_nothing_where_the_classes_fit(self, saved):
        model = Net()
        assert load(model, saved(GOOD), head="drop").dropped == ()
        assert holds(model, GOOD)

    @pytest.mark.parametrize("change", [{"width": 8}, {"width": 8, "classes": 10}])
    def test_drop_is_for_classifiers_alone(self, saved, change):
        with pytest.raises(WeightsError, match=r"wrong shape or type: conv\.weight"):
            load(Net(), saved(state_of(3, **change)), head="drop")

    def test_drop_is_not_for_a_missing_tensor(self, saved):
        theirs = state_of(3, classes=10)
        del theirs["conv.bias"]
        with pytest.raises(WeightsError, match=r"missing: conv\.bias"):
            load(Net(), saved(theirs), head="drop")
