"""A pruned network comes back to the bit, into a fresh dense instance or without any; everything else is one error."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import surgery_networks as networks
from trimtab.errors import InputError, OutputError
from trimtab.pruning import classes
from trimtab.pruning.document import checksum, read_document
from trimtab.pruning.saving import load_pruned, save_pruned
from trimtab.surgery import Head, Surgeon


class Cnn(nn.Module):
    """A user's own: batch norm, a square layer that can be taken out, a gain of its own, buffers of both sorts."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, 6, 3, stride=2, bias=False)
        self.body = nn.Sequential(nn.Linear(54, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Dropout(0.1))
        self.last = nn.Linear(10, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("offset", torch.zeros(4))
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = self.body(torch.relu(self.two(x)).flatten(1))
        return (self.last(x) * self.gain + self.offset) * self.mask


def inputs_of(name: str) -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=networks.generator(1)) if name == "own" else networks.make(name)[1]


def narrowed_cnn() -> nn.Module:
    model, inputs = Cnn(), inputs_of("own")
    model.train()
    model(inputs)  # running statistics that are none of a fresh network
    surgeon = Surgeon(model, inputs)
    surgeon.narrow("one", 5)
    surgeon.narrow("two", 3)
    surgeon.remove_layer("body.2")
    surgeon.narrow("body.0", 7)
    model.offset.fill_(0.25)
    model.mask[1] = 0.0
    model.last.bias.requires_grad_(False)
    return model


def narrowed(name: str) -> nn.Module:
    model, inputs = networks.make(name)
    surgeon = Surgeon(model, inputs)
    for group in surgeon.groups:
        if group.refusal is None and group.size > 1:
            surgeon.narrow(group.name, group.size // 2)
    return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def assert_same(loaded: nn.Module, saved: nn.Module, inputs: Tensor) -> None:
    ours, theirs = tensors_of(saved), tensors_of(loaded)
    assert list(theirs) == list(ours)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor), name
        assert theirs[name].requires_grad == tensor.requires_grad, name
    assert not any(module.training for module in loaded.modules())
    reference = copy.deepcopy(saved).eval()
    assert torch.equal(loaded(inputs), reference(inputs))


def test_a_users_cnn_comes_back_into_a_fresh_instance(tmp_path: Path) -> None:
    model, inputs = narrowed_cnn(), inputs_of("own")
    save_pruned(model, tmp_path / "net", extra={"accuracy": 0.5, "lost": float("nan")})
    fresh = Cnn()
    before = copy.deepcopy(fresh)
    loaded = load_pruned(tmp_path / "net", fresh)
    assert_same(loaded, model, inputs)
    assert loaded.one.out_channels == loaded.norm.num_features == loaded.two.in_channels == 5
    assert loaded.two.out_channels == 3
    assert loaded.body[0].in_features == 27
    assert type(loaded.body[2]) is nn.Identity
    assert type(fresh.body[2]) is nn.Linear
    assert all(torch.equal(tensor, tensors_of(before)[name]) for name, tensor in tensors_of(fresh).items())
    assert fresh.training
    assert not {id(t) for t in tensors_of(fresh).values()} & {id(t) for t in tensors_of(loaded).values()}
    assert read_document(tmp_path / "net" / "pruned.json").extra == {"accuracy": 0.5, "lost": None}
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["pruned.json", "weights.safetensors"]


def test_an_instance_of_the_pruned_shape_will_do_too(tmp_path: Path) -> None:
    model = narrowed_cnn()
    save_pruned(model, tmp_path)
    again = load_pruned(tmp_path, load_pruned(tmp_path, copy.deepcopy(model)))
    assert_same(again, model, inputs_of("own"))


def test_training_goes_on_afterwards(tmp_path: Path) -> None:
    save_pruned(narrowed_cnn(), tmp_path)
    loaded = load_pruned(tmp_path, Cnn()).train()
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    first = networks.train(loaded, inputs_of("own"), optimizer)
    assert networks.train(loaded, inputs_of("own"), optimizer, steps=20) < first


@pytest.mark.parametrize("name", ["residual", "concatenation", "lstm", "gru", "sst2-bilstm", "sst2-mlp"])
def test_every_kind_of_network_comes_back_into_a_fresh_instance(name: str, tmp_path: Path) -> None:
    model, inputs = narrowed(name), inputs_of(name)
    fresh = networks.make(name, torch.float32)[0]
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path, fresh)
    assert_same(loaded, model, inputs)
    small, large = [sum(p.numel() for p in m.parameters()) for m in (loaded, fresh)]
    assert small < large


def test_a_recurrent_layer_knows_its_new_size(tmp_path: Path) -> None:
    save_pruned(narrowed("lstm"), tmp_path)
    cells: Any = load_pruned(tmp_path, networks.make("lstm")[0]).cells
    assert cells.hidden_size == 2
    assert cells.weight_hh_l1_reverse.shape == (8, 2)
    for name, weight in zip(cells._flat_weights_names, cells._flat_weights, strict=True):
        assert weight is getattr(cells, name)


@pytest.mark.parametrize("name", ["mlp", "cnn", "digits-mlp", "mnist-cnn", "cifar10-cnn"])
def test_layers_in_sequence_come_back_without_a_class(name: str, tmp_path: Path) -> None:
    model, inputs = narrowed(name), inputs_of(name)
    save_pruned(model, tmp_path)
    state = torch.random.get_rng_state()
    loaded = load_pruned(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same(loaded, model, inputs)
    assert repr(loaded) == repr(model.eval())


def test_sequences_in_sequences_heads_and_layers_put_in_come_back_without_a_class(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Head(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))).double()
    inputs = inputs_of("mlp")
    surgeon = Surgeon(model, inputs)
    surgeon.deepen("0")
    surgeon.narrow("2.0", 2)
    save_pruned(model, tmp_path)
    loaded: Any = load_pruned(tmp_path)
    assert_same(loaded, model, inputs)
    assert type(loaded[2]) is Head
    assert loaded[0].layer is loaded[0][2]
    dense = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Head(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    assert_same(load_pruned(tmp_path, dense), model, inputs)


class Tied(nn.Module):
    """An output that is the embedding, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.one = nn.Linear(4, 4)
        self.other = self.one
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.other(self.one(self.tokens(x))))


class Untied(Tied):
    """The same without what is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)
        self.out.weight = nn.Parameter(torch.zeros(9, 4))


@pytest.mark.parametrize("kind", [Tied, Untied])
def test_shared_parameters_are_saved_once_and_shared_again(kind: type[nn.Module], tmp_path: Path) -> None:
    model, inputs = Tied(), torch.tensor([[1, 2]])
    save_pruned(model, tmp_path)
    assert set(load_tensors((tmp_path / "weights.safetensors").read_bytes())) == {
        "tokens.weight", "one.weight", "one.bias",
    }  # fmt: skip
    loaded: Any = load_pruned(tmp_path, kind())
    assert_same(loaded, model, inputs)
    assert loaded.out.weight is loaded.tokens.weight
    assert loaded.other.bias is loaded.one.bias
    assert len(list(loaded.parameters())) == 3


def test_ties_that_pruning_has_cut_are_cut_in_what_is_loaded(tmp_path: Path) -> None:
    model = Untied()
    save_pruned(model, tmp_path)
    loaded: Any = load_pruned(tmp_path, Tied())
    assert loaded.out.weight is not loaded.tokens.weight
    assert torch.equal(loaded.out.weight, model.out.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_odd_numbers_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        model.weight[0] = torch.tensor([float("nan"), -0.0, float("inf")])
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path)
    assert loaded.weight.dtype == dtype
    ours, theirs = (tensor.detach().view(torch.uint8) for tensor in (model.weight, loaded.weight))
    assert torch.equal(ours, theirs)


class Small(nn.Module):
    """Stands where a dense network has a Linear; what a replacement has to be."""

    def __init__(self, units: int, scale: float = 1.0) -> None:
        super().__init__()
        self.units, self.scale = units, scale
        self.out = nn.Linear(units, units)

    @property
    def options(self) -> dict[str, Any]:
        return {"units": self.units, "scale": self.scale}

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x[:, : self.units]) * self.scale


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part: nn.Module = nn.Linear(6, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(x))


def test_registered_classes_stand_where_the_dense_network_has_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(classes.REPLACEMENTS, "Small", Small)
    model = Host()
    model.part = Small(3, 0.5)
    save_pruned(model, tmp_path)
    assert_same(load_pruned(tmp_path, Host()), model, torch.randn(4, 6))
    assert_same(load_pruned(tmp_path, model), model, torch.randn(4, 6))
    change(tmp_path, lambda data: data["modules"]["part"]["options"].update(units=1 << 30))
    with pytest.raises(InputError, match=r"tensor 'part.out.weight' is .*\[3, 3\].*; with the sizes and options there"):
        load_pruned(tmp_path, Host())
    change(tmp_path, lambda data: data["modules"]["part"]["options"].update(units=[3]))
    with pytest.raises(InputError, match=r"module 'part' \(Small\) cannot be built: "):
        load_pruned(tmp_path, Host())
    monkeypatch.delitem(classes.REPLACEMENTS, "Small")
    with pytest.raises(InputError, match="is of the class 'Small', which no pruned network may have"):
        load_pruned(tmp_path, Host())


def test_a_whole_block_that_was_taken_out_stays_out(tmp_path: Path) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.two: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.three: nn.Module = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.two(self.one(x)))

    model = Blocks()
    model.two = nn.Identity()
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path, Blocks())
    assert_same(loaded, model, torch.ones(1, 4))
    assert [name for name, _ in loaded.named_modules()] == ["", "one", "one.0", "one.1", "two", "three"]
    model.three = nn.Linear(4, 4)
    save_pruned(model, tmp_path)
    with pytest.raises(
        InputError, match=r"module 'three' of the model is an instance of Identity, that of the saved net"
    ):
        load_pruned(tmp_path, Blocks())


def test_networks_without_tensors_or_with_empty_ones(tmp_path: Path) -> None:
    save_pruned(nn.Sequential(nn.ReLU()), tmp_path)
    assert repr(load_pruned(tmp_path)) == repr(nn.Sequential(nn.ReLU()))
    model = networks.mlp()
    model.register_buffer("empty", torch.zeros(0, 3))
    save_pruned(model, tmp_path)
    assert_same(load_pruned(tmp_path, model), model, inputs_of("mlp").float())


def test_parametrized_and_frozen_weights(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))

    model = make().requires_grad_(False)
    save_pruned(model, tmp_path)
    assert_same(load_pruned(tmp_path, make()), model, inputs_of("mlp").float())


def test_a_builder_is_handed_to_make(tmp_path: Path) -> None:
    model = narrowed_cnn()
    builder = {"task": "mine", "scale": "small", "info": {"channels": 8}}
    save_pruned(model, tmp_path, builder=builder)
    given = []

    def make(saved: Any) -> nn.Module:
        given.append(saved)
        return Cnn(saved["info"]["channels"])

    state = torch.random.get_rng_state()
    assert_same(load_pruned(tmp_path, make=make), model, inputs_of("own"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert given == [builder]
    with pytest.raises(
        InputError, match=r"it is of the class Cnn, .*; give model=, a fresh instance .* or make=.*'task': 'mine'"
    ):
        load_pruned(tmp_path)
    with pytest.raises(InputError, match="gave an instance of int; expected the dense network"):
        load_pruned(tmp_path, make=lambda saved: 3)  # type: ignore[arg-type, return-value]


def test_what_a_builder_says_takes_no_memory_and_its_errors_are_one(tmp_path: Path) -> None:
    model = narrowed("sst2-mlp")
    save_pruned(model, tmp_path, builder={"vocab_size": 1 << 40})

    def make(builder: Any) -> nn.Module:
        return networks.models.MeanEmbedding(builder["vocab_size"], 6, 5, 2)

    loaded = load_pruned(tmp_path, make=make)
    assert_same(loaded, model, inputs_of("sst2-mlp"))
    assert loaded.tokens.num_embeddings == 20
    with pytest.raises(
        InputError, match=r"make fails with the builder \{'vocab_size': .*'size'; give model=, as it was"
    ):
        load_pruned(tmp_path, make=lambda builder: make({"vocab_size": builder["size"]}))

    def forgetful(builder: Any) -> nn.Module:
        network = make(builder)
        network.scale = torch.ones(1)
        return network

    with pytest.raises(InputError, match="module '' that make gave keeps the tensor 'scale', which is no parameter or"):
        load_pruned(tmp_path, make=forgetful)


def test_classes_derived_from_torchs_follow(tmp_path: Path) -> None:
    class Mine(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self, units: int) -> None:
            super().__init__()
            self.one = Mine(6, units)
            self.two = nn.Linear(units, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))

    save_pruned(Net(3), tmp_path)
    loaded: Any = load_pruned(tmp_path, Net(8))
    assert type(loaded.one) is Mine
    assert loaded.one.out_features == loaded.two.in_features == 3


def test_hooked_layers_and_classes_of_ones_own_are_not_built_from_the_file(tmp_path: Path) -> None:
    hooked = networks.mlp()
    hooked[0].register_forward_hook(lambda module, given, output: output * 2)
    save_pruned(hooked, tmp_path / "hooked")
    with pytest.raises(
        InputError, match="it is of the class Sequential, which the file alone cannot build; give model=, a fresh"
    ):
        load_pruned(tmp_path / "hooked")
    extended = nn.Sequential(nn.Linear(3, 2))
    extended[0].register_buffer("more", torch.zeros(1))
    save_pruned(extended, tmp_path / "extended")
    with pytest.raises(InputError, match="give model="):
        load_pruned(tmp_path / "extended")
    assert_same(load_pruned(tmp_path / "extended", copy.deepcopy(extended)), extended, torch.ones(1, 3))


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "Linear": (3, 4), "Bilinear": (2, 3, 4), "LayerNorm": (4,), "RMSNorm": ([4, 5],), "GroupNorm": (2, 4),
    "Embedding": (5, 3, 0), "EmbeddingBag": (5, 3), "LSTM": (3, 4, 2), "GRU": (3, 4), "RNN": (3, 4), "LSTMCell": (3, 4),
    "GRUCell": (3, 4), "RNNCell": (3, 4), "MultiheadAttention": (4, 2), "Threshold": (0.1, 0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", classes.LAYERS)
def test_every_layer_of_the_table_is_built_again(name: str) -> None:
    layer = classes.LAYERS[name]
    usual = (4, 6, 3) if "Conv" in name else (4,) if "Norm" in name else (2,) if "Pool" in name else ()
    module = layer.kind(*ARGUMENTS.get(name, usual))
    kinds = {**layer.sizes, **layer.attributes}
    values = {key: kind.read(module, key) for key, kind in kinds.items()}
    assert [key for key, kind in kinds.items() if not kind.fits(values[key])] == []
    own = {key: t for key, t in tensors_of(module).items() if "." not in key}
    assert {key: layer.shape(key, values) for key in own} == {key: tuple(t.shape) for key, t in own.items()}
    assert layer.problem(values, own) is None
    if layer.can_be_built:
        built = layer.build(values)
        assert {key: kind.read(built, key) for key, kind in kinds.items()} == values
        assert {key: t.shape for key, t in tensors_of(built).items()} == {key: t.shape for key, t in own.items()}
        assert repr(built) == repr(module)


# What is refused when saving


def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "net"

    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    wrong = nn.Linear(4, 3)
    wrong.in_features = 5
    tries: list[tuple[Any, dict[str, Any], str]] = [
        (nn.Linear, {}, "cannot save the class Linear; give an nn.Module"),
        (nn.Linear(2, 2), {"extra": {"a": torch.ones(1)}}, "extra cannot be written as JSON .* not tensors or arrays"),
        (nn.Linear(2, 2), {"builder": [1]}, "builder is a list; give a dict that JSON can hold"),
        (Extra(2, 2), {}, r"module '' \(Extra\) has state beyond tensors \(get_extra_state\)"),
        (nn.LazyLinear(2), {}, r"tensor 'weight' has no shape yet \(a lazy layer\)"),
        (nn.Linear(2, 2, device="meta"), {}, r"'weight' is sparse, quantized or without values \(meta\)"),
        (
            nn.Linear(2, 2, dtype=torch.complex64),
            {},
            "'weight' has the dtype torch.complex64; expected one of float64, ",
        ),
        (
            wrong,
            {},
            r"Linear cannot be saved: module '' \(Linear\) has in_features 5, .* \(3, 5\); the tensor has \(3, 4\)",
        ),
    ]
    for model, options, text in tries:
        with pytest.raises(InputError, match=text):
            save_pruned(model, folder, **options)
        assert not folder.exists()


def test_folders_that_cannot_be_written_or_are_others(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot save into .*file/net: .*; give a folder that can be written"):
        save_pruned(model, tmp_path / "file" / "net")
    (tmp_path / "net" / "weights.safetensors").mkdir(parents=True)
    (tmp_path / "net" / "pruned.json").write_text("{}")
    with pytest.raises(OutputError, match=r"weights.safetensors is a folder; give another folder to save into"):
        save_pruned(model, tmp_path / "net")
    (tmp_path / "weights.safetensors").write_text("a brain's")
    with pytest.raises(OutputError, match=r"holds a weights.safetensors but no pruned.json, so it is somebody else's"):
        save_pruned(model, tmp_path)
    assert (tmp_path / "weights.safetensors").read_text() == "a brain's"


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.pruning import saving

    first = nn.Linear(2, 2)
    save_pruned(first, tmp_path)
    write = saving.atomic_write

    def full(path: Path, data: bytes | str) -> None:
        if path.suffix == ".safetensors":
            raise OutputError("no space left on device")
        write(path, data)

    monkeypatch.setattr(saving, "atomic_write", full)
    for folder in (tmp_path, tmp_path / "new" / "one"):
        with pytest.raises(OutputError, match=r"cannot save into .*: no space left on device"):
            save_pruned(nn.Linear(3, 3), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned.json", "weights.safetensors"]
    assert torch.equal(load_pruned(tmp_path).weight, first.weight)


def test_files_of_two_saves_do_not_go_together(tmp_path: Path) -> None:
    save_pruned(nn.Linear(2, 2), tmp_path / "one")
    save_pruned(nn.Linear(2, 2), tmp_path / "two")
    (tmp_path / "one" / "pruned.json").replace(tmp_path / "two" / "pruned.json")
    with pytest.raises(InputError, match=r"is not what was saved with pruned\.json"):
        load_pruned(tmp_path / "two")


# What is refused when loading


def change(folder: Path, edit: Callable[[dict[str, Any]], object], tensors: dict[str, Tensor] | None = None) -> None:
    """Forge the files, with sums that are right."""
    path = folder / "pruned.json"
    data = json.loads(path.read_text())
    if tensors is not None:
        raw = save_tensors(tensors)
        (folder / "weights.safetensors").write_bytes(raw)
        data["sha256"] = hashlib.sha256(raw).hexdigest()
    edit(data)
    data["checksum"] = checksum(data)
    path.write_text(json.dumps(data))


def module(name: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["modules"][name].update(fields)


def size(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["modules"][name]["sizes"].update({key: value})


def option(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["modules"][name]["options"].update({key: value})


def tensor(name: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["tensors"][name].update(fields)


HUGE = 1 << 30
FORGED: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "format",
        lambda d: d.update(format="trimtab-brain"),
        "is not of a pruned network: expected the format 'trimtab-p",
    ),
    ("version", lambda d: d.update(version=2), "has version 2, this trimtab reads version 1; upgrade trimtab"),
    ("version true", lambda d: d.update(version=True), "has version True, this trimtab reads version 1"),
    ("no version", lambda d: d.pop("version"), "has version None, this trimtab reads version 1"),
    ("missing key", lambda d: d.pop("tied"), "tied is .*: Field required"),
    ("unknown key", lambda d: d.update(run="x"), "run is 'x': Extra inputs are not permitted"),
    ("modules a list", lambda d: d.update(modules=[]), r"modules is \[\]: Input should be"),
    ("extra a list", lambda d: d.update(extra=[]), r"extra is \[\]: Input should be"),
    ("os:system", module("0", kind="os:system"), "module '0' is of the class 'os:system', which no pruned network may"),
    (
        "builtins.eval",
        module("0", kind="builtins.eval"),
        "class 'builtins.eval', which .* nothing is looked up by that",
    ),
    ("reduce", module("1", kind="torch.nn.Module.__reduce__"), "class 'torch.nn.Module.__reduce__', which"),
    ("ModuleDict", module("1", kind="torch.nn.ModuleDict"), "class 'torch.nn.ModuleDict', which"),
    (
        "ModuleDict short",
        module("1", kind="ModuleDict"),
        "class 'ModuleDict', which .*; known: Linear, Bilinear, Conv1d",
    ),
    ("qualified", module("0", kind="torch.nn.Conv2d"), "class 'torch.nn.Conv2d', which"),
    ("class a list", module("0", kind=["Linear"]), "modules.0.kind is .*: Input should be a valid string"),
    (
        "size negative",
        size("0", "in_channels", -2),
        "'0' .Conv2d. has in_channels = -2; expected a whole number from 1",
    ),
    ("size zero", size("0", "groups", 0), "has groups = 0; expected a whole number from 1 up"),
    ("size text", size("0", "out_channels", "4"), "has out_channels = '4'; expected a whole number from 1 up"),
    ("size true", size("0", "groups", True), "has groups = True; expected a whole number from 1 up"),
    ("size float", size("0", "out_channels", 2.0), "has out_channels = 2.0; expected a whole number from 1 up"),
    ("size endless", size("0", "out_channels", 10**30), "has out_channels = 10{30}; expected"),
    ("size huge", size("8", "in_features", HUGE), rf"'8' \(Linear\) has in_features {HUGE}, .*the tensor has \(2, 3\)"),
    (
        "size missing",
        lambda d: d["modules"]["8"]["sizes"].pop("in_features"),
        r"has \['bias', 'out_features'\]; expected",
    ),
    ("size unknown", size("8", "__class__", 3), r"has \['__class__', .*; expected \['bias', 'in_f"),
    ("groups", size("0", "groups", 2), r"weight has the shape \(2, 1, 3, 3\); the tensor has \(2, 2, 3, 3\)"),
    ("norm", size("1", "num_features", 3), r"'1' \(BatchNorm2d\) has num_features 3.*\(3\); the tensor has \(2\)"),
    ("option type", option("0", "stride", "1"), "has stride = '1'; expected a list of 2 whole numbers from 1 up"),
    ("option choice", option("0", "padding_mode", "exec"), "has padding_mode = 'exec'; expected one of zeros, reflect"),
    (
        "option unknown",
        option("2", "forward", 1),
        r"module '2' \(ReLU\) has \['forward', 'inplace'\]; expected \['inplace'",
    ),
    (
        "kernel",
        option("0", "kernel_size", [5, 5]),
        r"weight has the shape \(2, 2, 5, 5\); the tensor has \(2, 2, 3, 3\)",
    ),
    (
        "bias",
        option("8", "bias", False),
        r"tensor '8.bias' is .* in the file; with the sizes and options there it is miss",
    ),
    ("dtype", tensor("8.weight", dtype="object"), "tensor '8.weight' has the dtype 'object'; known: float64, "),
    (
        "dtype other",
        tensor("8.weight", dtype="int64"),
        "8.weight' is a parameter of int64 and cannot require a gradient",
    ),
    (
        "dtype alike",
        tensor("8.weight", dtype="float16"),
        "tensor '8.weight' is float64 of shape .*, pruned.json says float16",
    ),
    (
        "shape negative",
        tensor("8.weight", shape=[-2, 3]),
        "tensors.8.weight.shape.0 is -2: .* greater than or equal to 0",
    ),
    (
        "shape huge",
        tensor("8.weight", shape=[HUGE, HUGE]),
        rf"its weight has the shape \(2, 3\); the tensor has \({HUGE}, ",
    ),
    ("shape text", tensor("8.weight", shape="ab"), "tensors.8.weight.shape is 'ab': Input should be a valid list"),
    ("kind", tensor("8.weight", kind="buffer"), "'8.weight' is a buffer of float64 and cannot require a gradient"),
    (
        "one more",
        lambda d: d["tensors"].update(x=d["tensors"]["8.bias"]),
        "tensor 'x' is missing in .*, pruned.json says float64 of",
    ),
    (
        "one less",
        lambda d: d["tensors"].pop("8.bias"),
        "tensor '8.bias' is float64 of shape .*, pruned.json says there is n",
    ),
    (
        "tied to nothing",
        lambda d: d["tied"].update(a="b"),
        "tensor 'a' is tied to 'b', which stands for no other tensor",
    ),
    ("tied twice", lambda d: d["tied"].update({"8.bias": "1.bias"}), "tensor '8.bias' is tied to '1.bias', which"),
    (
        "children",
        module("", children=["0", "0"]),
        "module '' has the children .*; expected names without dots, each once",
    ),
    ("child unknown", module("", children=["0", "99"]), "module '99' is not described, so the network has to be given"),
    (
        "child forward",
        lambda d: (d["modules"][""].update(children=["forward"]), d["modules"].update(forward=d["modules"]["2"])),
        r"module '' \(Sequential\) cannot be bu",
    ),
    ("children of a layer", module("0", children=["1"]), "module '0' .'Conv2d'. has children; only Sequential, Head"),
    ("Deepened", module("", kind="Deepened"), r"module '' \(Deepened\) has to have children, and options .*place"),
    (
        "Deepened's place",
        module("", kind="Deepened", options={"place": 7}),
        "module '' is no Deepened: place 7 of 12 mod",
    ),
    ("Identity", module("0", kind="Identity"), r"module '0' \(Identity\) has to have options and no sizes"),
    (
        "replaced",
        lambda d: d["modules"].update({"0": {"kind": "Identity", "options": {}}}),
        "tensor '0.weight' is .* in the",
    ),
    (
        "replaced, options",
        lambda d: d["modules"].update({"2": {"kind": "Identity", "options": {"f": 1}}}),
        r"module '2' \(Identity\) has the options \{'f': 1\}; made with them it has",
    ),
    ("deep", lambda d: d["modules"].update({"a." * 70: d["modules"]["2"]}), "lies deeper than 64 modules"),
    ("no root", lambda d: d["modules"].pop(""), "describes the whole network, and does not describe its outermost"),
]


@pytest.mark.parametrize(("edit", "text"), [row[1:] for row in FORGED], ids=[row[0] for row in FORGED])
def test_what_is_forged_is_refused(edit: Callable[[dict[str, Any]], object], text: str, tmp_path: Path) -> None:
    model = narrowed("cnn")
    save_pruned(model, tmp_path)
    change(tmp_path, edit)
    with pytest.raises(InputError, match=text):
        load_pruned(tmp_path)


RECURRENT: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "layers",
        option("cells", "num_layers", 10**9),
        "num_layers 1000000000 with bidirectional True does not go with 4 tens",
    ),
    ("directions", option("cells", "bidirectional", False), "num_layers 2 with bidirectional False does not go with 4"),
    (
        "hidden",
        size("cells", "hidden_size", HUGE),
        rf"'cells' \(LSTM\) has input_size 2, hidden_size {HUGE}, proj_size 0, with wh",
    ),
    ("projection", size("cells", "proj_size", 2), "proj_size 2 is not below hidden_size 2"),
    (
        "embedding",
        size("tokens", "num_embeddings", HUGE),
        r"\(Embedding\) has num_embeddings .*; the tensor has \(20, 2\)",
    ),
]


@pytest.mark.parametrize(("edit", "text"), [row[1:] for row in RECURRENT], ids=[row[0] for row in RECURRENT])
def test_what_is_forged_of_recurrent_layers_is_refused(
    edit: Callable[[dict[str, Any]], object], text: str, tmp_path: Path
) -> None:
    save_pruned(narrowed("lstm"), tmp_path)
    change(tmp_path, edit)
    with pytest.raises(InputError, match=text):
        load_pruned(tmp_path, networks.make("lstm")[0])


def test_what_torch_itself_refuses_is_one_error(tmp_path: Path) -> None:
    save_pruned(nn.Sequential(nn.Embedding(5, 4)), tmp_path)
    change(tmp_path, option("0", "padding_idx", 5))
    with pytest.raises(InputError, match=r"module '0' \(Embedding\) cannot be built: Padding_idx must be within"):
        load_pruned(tmp_path)


def test_models_of_another_architecture_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    save_pruned(narrowed_cnn(), tmp_path)

    def other(edit: Callable[[Any], object]) -> nn.Module:
        model = Cnn()
        edit(model)
        return model

    def add(name: str, value: Any) -> nn.Module:
        return other(lambda m: setattr(m, name, value))

    tries: list[tuple[Any, str]] = [
        (Cnn, "model is the class Cnn; give an instance of it, as it was before pruning"),
        (3, "model is an instance of int; give an nn.Module"),
        (nn.Linear(2, 2), "the model has no module 'body.2'"),
        (add("more", nn.Linear(2, 2)), r"the model has a module 'more' \(Linear\), the saved network has none"),
        (add("more", nn.Parameter(torch.ones(2))), "the model has, and the saved network has not, the tensors 'more';"),
        (add("gain", None), "the model lacks the tensors 'gain';"),
        (add("gain", nn.Parameter(torch.ones(2, 2))), "'gain' of the model is a parameter of 2 axes, that .* of 1;"),
        (
            add("norm", nn.InstanceNorm2d(8)),
            "'norm' of the model is an instance of InstanceNorm2d, that of the saved network one of Bat",
        ),
        (add("two", nn.Conv2d(8, 6, 3, bias=False)), r"'two' of the model has stride = \[1, 1\], that .* \[2, 2\];"),
        (
            add("last", nn.Linear(10, 4, bias=False)),
            "'last' of the model has bias = False, that of the saved network True",
        ),
        (add("last", nn.LazyLinear(4)), r"tensor 'last.weight' of the model has no shape yet \(a lazy layer\)"),
        (other(lambda m: m.body.append(nn.Tanh())), "'body' of the model holds .*'5'.*, that of the saved network "),
    ]
    for model, text in tries:
        before = copy.deepcopy(model) if isinstance(model, nn.Module) else None
        with pytest.raises(InputError, match=text) as caught:
            load_pruned(tmp_path, model)
        assert isinstance(caught.value, InputError)
        if before is not None and "lazy" not in text:
            assert repr(model) == repr(before)
            assert all(torch.equal(t, tensors_of(before)[name]) for name, t in tensors_of(model).items())


def test_missing_and_torn_files_and_devices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no pruned network in .*nowhere: pruned.json is missing; give a folder that"):
        load_pruned(tmp_path / "nowhere")
    save_pruned(nn.Linear(2, 2), tmp_path)
    with pytest.raises(InputError, match="map_location is 'gpu', which is no device here"):
        load_pruned(tmp_path, map_location="gpu")
    path = tmp_path / "pruned.json"
    whole = path.read_bytes()
    for raw in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, whole[:-10], whole[: len(whole) // 2]):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=r"pruned.json cannot be read as JSON \(.*; it is torn or foreign"):
            load_pruned(tmp_path)
    for raw in (b"null", b"[]", b'"trimtab-pruned"', b"{}"):
        path.write_bytes(raw)
        with pytest.raises(InputError, match="is not of a pruned network: expected the format"):
            load_pruned(tmp_path)
    path.write_bytes(b'{"format": "trimtab-pruned", "version": 1, "extra": ' + b"[" * 900 + b"]" * 900 + b"}")
    with pytest.raises(InputError, match="is not what was saved"):
        load_pruned(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"weights.safetensors is missing, or has not the 24 bytes of its tensors and a h"
    ):
        load_pruned(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"no pruned network in .*: pruned\.json is missing"):
        load_pruned(tmp_path)


def test_flipped_and_cut_bytes_are_errors_everywhere(tmp_path: Path) -> None:
    save_pruned(narrowed("cnn"), tmp_path)
    for name in ("pruned.json", "weights.safetensors"):
        path = tmp_path / name
        raw = path.read_bytes()
        for place in range(0, len(raw), max(1, len(raw) // 60)):
            for torn in (raw[:place], raw[:place] + bytes([raw[place] ^ 0x11]) + raw[place + 1 :]):
                path.write_bytes(torn)
                with pytest.raises(InputError):
                    load_pruned(tmp_path)
        path.write_bytes(raw + b"\0")
        with pytest.raises(InputError):
            load_pruned(tmp_path)
        path.write_bytes(raw)
    load_pruned(tmp_path)


def test_flipped_bytes_under_right_sums_never_make_other_shapes(tmp_path: Path) -> None:
    """Whoever forges the sums too gets an error, or a network of the shapes that the file has."""
    model = networks.mlp()
    save_pruned(model, tmp_path)
    document, weights = tmp_path / "pruned.json", tmp_path / "weights.safetensors"
    text, raw = document.read_text(), weights.read_bytes()
    outcomes = {"error": 0, "loaded": 0}

    def load(data: dict[str, Any]) -> None:
        data["checksum"] = checksum(data)
        document.write_text(json.dumps(data))
        try:
            loaded = load_pruned(tmp_path)
        except InputError:
            outcomes["error"] += 1
            return
        outcomes["loaded"] += 1
        named = json.loads(document.read_text())["tensors"]
        assert {name: list(t.shape) for name, t in tensors_of(loaded).items()} == {
            n: e["shape"] for n, e in named.items()
        }
        assert [(m.in_features, m.out_features) for m in loaded if isinstance(m, nn.Linear)] == [(6, 5), (5, 5), (5, 3)]

    header = 8 + int.from_bytes(raw[:8], "little")
    for place in [*range(0, header, 2), *range(header, len(raw), 64)]:
        flipped = raw[:place] + bytes([raw[place] ^ 0x04]) + raw[place + 1 :]
        weights.write_bytes(flipped)
        load({**json.loads(text), "sha256": hashlib.sha256(flipped).hexdigest()})
    weights.write_bytes(raw)
    for place in range(0, len(text), 7):
        flipped_text = text[:place] + chr(ord(text[place]) ^ 0x01) + text[place + 1 :]
        try:
            data = json.loads(flipped_text)
        except ValueError:
            continue
        load(data)
    assert outcomes["error"] > 100
    assert outcomes["loaded"] > 5


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(leaf for key, value in items for leaf in leaves(value, (*path, key)))]


@pytest.mark.slow
def test_no_value_in_any_place_of_the_document_is_anything_but_an_error_or_loaded(tmp_path: Path) -> None:
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Embedding(5, 4, 0), nn.LSTM(4, 3, 2), nn.GELU()
    save_pruned(nn.Sequential(*layers, nn.Sequential(nn.Identity(), nn.LayerNorm(3))), tmp_path)
    path = tmp_path / "pruned.json"
    text = path.read_text()
    n_loaded = 0
    for *parents, last in (leaf for key in ("modules", "tensors") for leaf in leaves(json.loads(text)[key], (key,))):
        for value in (None, True, -1, 2, 10**30, 0.5, "same", [1], {}):
            data = json.loads(text)
            inside = data
            for key in parents:
                inside = inside[key]
            inside[last] = value
            data["checksum"] = checksum(data)
            path.write_text(json.dumps(data))
            try:
                loaded = load_pruned(tmp_path)
            except InputError:
                continue
            n_loaded += 1
            shapes = {name: entry["shape"] for name, entry in data["tensors"].items()}
            assert {name: list(t.shape) for name, t in tensors_of(loaded).items()} == shapes
    assert 5 <= n_loaded <= 100
