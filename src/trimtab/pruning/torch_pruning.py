"""TorchPruningNetwork: a `Prunable` whose cutting is done by Torch-Pruning, an optional library.

Takes the place of `network.PrunableNetwork` where that refuses a network as a whole (autograd, by which this library
traces, follows one forward pass through anything, branches on data included), and is an independent check of it in the
tests. Source: Fang, Ma, Song, Mi, Wang 2023, *DepGraph: Towards Any Structural Pruning*, arXiv:2301.12900; package
torch-pruning 1.6.1.

Torch-Pruning passes over in silence what it has no rule for, and takes some layers for others (FINDINGS section 4). So
nothing of it is believed: it says which places belong to a unit, and those are checked; all parts are cut together once
at the beginning, and a part whose cut fails, or changes what the network computes from the units that stay, is refused;
and after each cut the shape of every tensor is compared with what was asked.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trimtab.cost import as_inputs, count_by_module, size_of
from trimtab.errors import InputError, RunFailedError, unknown_name
from trimtab.pruning.calibration import recalibrate
from trimtab.pruning.costs import ClosedForm, Counts, Factor, Term
from trimtab.pruning.importance import random_scores, ranked
from trimtab.pruning.network import copied
from trimtab.pruning.parts import Configuration, Part, check_configuration, width_grid
from trimtab.pruning.torch_pruning_graph import (
    RIDES,
    ROOTS,
    Graph,
    Group,
    import_library,
    is_depthwise,
    join,
    named_tensors,
    sharing,
    unsupported,
)

__all__ = ["IMPORTANCE", "TorchPruningNetwork"]

IMPORTANCE = ("l2", "random")

_LAYERS = (*ROOTS, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)  # and what users derive from them
_TOLERANCE = 1e-2  # of the largest output: more than TF32 rounds, less than units in wrong places make


class TorchPruningNetwork:
    """What can be pruned of one network by Torch-Pruning.

    Its tracing follows autograd from the outputs on the example inputs back to the layers. Where a forward branches on
    its inputs, that is the branch of the example inputs, and the one whose FLOPs are counted: layers of another are
    named in `refused`, and if they read the units of a part, name that part in `ignore`.

    Parts start from Linear and convolutions, in the order in which they are called. A group has to stay where its
    units reach an output of the network without another layer in between (one of its tensors is made by an operation
    that an output is the result of), where a parameter lies on them that no module of a known kind holds, and where
    they meet a recurrent layer, attention, grouped convolutions or group norms.

    FLOPs and parameters are a closed form made from the places of the units, held against the counter
    (`trimtab.cost`) at the smallest widths; where it is not right there (FLOPs of functions without a module), each
    configuration is cut, counted and remembered, which takes as long as a cut each time.

    Args:
        model: Trained; it is copied and never touched.
        example_inputs: A tensor, or a tuple of the forward's positional arguments. FLOPs are those of this batch. With
            zeros for inputs less can be checked.
        multiple: Widths are multiples of it, but for narrow parts and the dense width: see `parts.width_grid`.
        importance: One of `IMPORTANCE`, as in `trimtab.pruning.importance.unit_scores`; which units go first.
        ignore: Names of layers whose units stay.
        seed: Of the importance "random".

    Attributes:
        model: A copy of the dense network, in evaluation.
        inputs: The example inputs as positional arguments.
        parts: In the order of the forward.
        refused: Layer, or parameter that is in none -> why its units have to stay.
        dense: The configuration in which everything stays.
        scores: (units,) of each part, float64.
        orders: (units,) of each part, the most important first.
        costs: FLOPs and parameters by configuration; None where each is counted.
        calibration: Batches of inputs that the batch-norm statistics of every cut are taken anew of; () leaves them as
            they are in the dense network.

    Raises:
        MissingExtraError: Torch-Pruning is not installed.
        InputError: The network cannot be copied or traced, fails on the inputs, nothing of it can be pruned, or an
            argument is none.
        RunFailedError: Parts that can be cut one by one cannot be cut together.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object,
        *,
        multiple: int = 8,
        importance: str = "l2",
        ignore: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise InputError(f"multiple is {multiple!r}; expected a whole number of 1 or more, 8 for fast kernels")
        if importance not in IMPORTANCE:
            raise unknown_name("importance for Torch-Pruning", importance, IMPORTANCE)
        self._library = import_library()
        self.inputs = as_inputs(example_inputs)
        self.calibration: Sequence[tuple[Tensor, ...]] = ()
        self.model = copied(model)
        counts = count_by_module(self.model, self.inputs)
        self._tensors = dict(named_tensors(self.model))
        self.refused: dict[str, str] = {}
        found = self._groups(multiple, ignore)
        self._set(found, multiple, importance, seed)
        smallest = self._tried()
        kept = [group for group in self._by_place if group.refusal is None]
        if len(kept) < len(found):
            self._set(kept, multiple, importance, seed)
            smallest = self._tried()
        self._name_the_rest()
        known = {*self.refused, *(layer for part in self.parts for layer in part.layers)}
        for name in ignore:
            if name not in known:
                raise unknown_name("layer to ignore", name, sorted(known))
        if smallest is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise InputError(f"nothing of {type(model).__name__} can be pruned: {reasons or 'it has no layers'}")
        self.costs: ClosedForm | None = ClosedForm(self.model, counts, self.dense, self._terms(counts))
        self._counted: dict[Configuration, tuple[int, int]] = {}
        configuration = self._smallest()
        if (self.flops(configuration), self.parameters(configuration)) != self._count(smallest):
            self.costs = None

    # What there is

    def _groups(self, multiple: int, ignore: Collection[str]) -> list[Group]:
        """Groups that may be pruned; layers of others get their reason in `refused`."""
        graph = Graph(self._library, copy.deepcopy(self.model), self.inputs)
        shared = sharing(self.model)
        found, seen = [], set[str]()
        for name in graph.roots:
            if name in seen:
                continue
            group = graph.group(name, shared)
            seen |= {name, *group.covered}
            if any(maker in ignore for maker in group.makers):
                group.refuse("it was asked to stay (ignore)")
            if len(width_grid(group.size, multiple)) < 2:
                group.refuse("it has one unit")
            if group.refusal is None:
                found.append(group)
            else:
                self._refuse(group)
        return found

    def _refuse(self, group: Group) -> None:
        for maker in group.makers:
            self.refused.setdefault(maker, str(group.refusal))

    def _set(self, groups: Sequence[Group], multiple: int, importance: str, seed: int) -> None:
        self._by_place = tuple(groups)
        self.parts = tuple(
            Part(
                group.root,
                type(self.model.get_submodule(group.root)).__name__,
                group.size,
                width_grid(group.size, multiple),
                tuple(group.makers),
            )
            for group in groups
        )
        self.dense: Configuration = tuple(group.size for group in groups)
        self.scores = tuple(
            self._norms(group) if importance == "l2" else random_scores(group.size, seed, group.root)
            for group in groups
        )
        self.orders = tuple(ranked(scores) for scores in self.scores)

    def _norms(self, group: Group) -> Tensor:
        """As "l2" of `trimtab.pruning.importance.unit_scores`."""
        square = torch.zeros(group.size, dtype=torch.float64)
        for place in group.places:
            if place.attribute == "weight":
                rows = self._tensors[place.tensor].detach().cpu().double().square().movedim(place.axis, 0)
                square += rows.reshape(len(rows), -1).sum(1)[place.index].sum(1)
        return square.sqrt()

    def _name_the_rest(self) -> None:
        """Reasons for layers that no group was found for."""
        made = {layer for part in self.parts for layer in part.layers}
        modules = dict(self.model.named_modules())
        attentions = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.MultiheadAttention))
        for name, module in modules.items():
            own = [key for key, _ in module.named_parameters(recurse=False)]
            if not own or name in made or name.startswith(attentions) or isinstance(module, RIDES):
                continue
            if not isinstance(module, _LAYERS) and not type(module).__module__.startswith("torch."):
                for key in own:
                    self.refused[join(name, key)] = "a parameter by itself: its units may lie on any axis"
                continue
            reason = unsupported(module)
            if reason is None and isinstance(module, nn.Embedding):
                reason = "Torch-Pruning starts from Linear and convolutions"
            if not is_depthwise(module):
                out_of_reach = "the example inputs do not reach it, or autograd finds no way from it to an output"
                self.refused.setdefault(name, reason or out_of_reach)

    # What it costs

    def flops(self, configuration: Sequence[int]) -> int:
        """FLOPs of a forward pass of the example inputs; two a multiply-add."""
        return self._cost(configuration)[0]

    def parameters(self, configuration: Sequence[int]) -> int:
        """Numbers in all parameters."""
        return self._cost(configuration)[1]

    def _cost(self, configuration: Sequence[int]) -> tuple[int, int]:
        checked = check_configuration(configuration, self.parts)
        if self.costs is not None:
            effective = checked, (True,) * len(checked)
            return self.costs.flops(effective), self.costs.parameters(effective)
        if checked not in self._counted:
            self._counted[checked] = self._count(self.cut(checked))
        return self._counted[checked]

    def _count(self, model: nn.Module) -> tuple[int, int]:
        return count_by_module(model, self.inputs)[""], size_of(model)[0]

    def _terms(self, counts: Counts) -> list[Term]:
        """Of every tensor that has places for units; a module's FLOPs go by the size of its weight."""
        axes: dict[str, dict[int, dict[int, int]]] = {}  # tensor -> axis -> part -> places of a unit
        modules = {}
        for part, group in enumerate(self._by_place):
            for place in group.places:
                axes.setdefault(place.tensor, {}).setdefault(place.axis, {})[part] = place.index.shape[1]
                modules[place.tensor] = place.module
        terms = []
        for name, moving in axes.items():
            tensor = self._tensors[name]
            factors = [Factor(self._fixed(tensor.shape[axis], parts), parts) for axis, parts in moving.items()]
            one, two = (*factors, Factor(), Factor())[:2]  # no weight has units on three axes
            rest = 1
            for axis, length in enumerate(tensor.shape):
                rest *= 1 if axis in moving else length
            is_weight = name == join(modules[name], "weight") and tensor.ndim >= 2
            flops = counts.get(modules[name], 0) / tensor.numel() if is_weight else 0.0
            terms.append(Term(modules[name], (one, two), flops * rest, rest * isinstance(tensor, nn.Parameter)))
        return terms

    def _fixed(self, length: int, by_part: Mapping[int, int]) -> int:
        return length - sum(each * self.dense[part] for part, each in by_part.items())

    # The cut

    def cut(self, configuration: Sequence[int], orders: Sequence[Tensor] | None = None) -> nn.Module:
        """A copy of the network with the configuration's widths, in evaluation.

        Part after part by Torch-Pruning, each once with all units that go, so that their places are those of the dense
        network; then compared with what was asked, and run on the example inputs.

        Args:
            configuration: A width for each part.
            orders: Units of each part by importance, instead of `orders`.

        Raises:
            RunFailedError: Torch-Pruning fails, a tensor has not the shape that was asked for, or the network that it
                made does not run.
        """
        checked = check_configuration(configuration, self.parts)
        used = self.orders if orders is None else orders
        new = copy.deepcopy(self.model)
        if checked != self.dense:
            graph = Graph(self._library, new, self.inputs)
            for width, group, order in zip(checked, self._by_place, used, strict=True):
                if width < group.size:
                    graph.prune(group.root, order[width:].tolist())
        self._compare(new, checked)
        for name, tensor in named_tensors(new):
            tensor.requires_grad_(self._tensors[name].requires_grad)  # all that was cut, and traced, asks for gradients
        self._run(new.eval())
        if self.calibration and checked != self.dense:
            recalibrate(new, self.calibration)
        return new

    def _compare(self, new: nn.Module, configuration: Configuration) -> None:
        """Torch-Pruning passes over in silence what it cannot cut: look at every tensor."""
        asked = {name: list(tensor.shape) for name, tensor in self._tensors.items()}
        for width, group in zip(configuration, self._by_place, strict=True):
            for place in group.places:
                asked[place.tensor][place.axis] -= place.index.shape[1] * (group.size - width)
        found = {name: list(tensor.shape) for name, tensor in named_tensors(new)}
        for name in asked:
            if found.get(name) != asked[name]:
                layer, _, attribute = name.rpartition(".")
                raise RunFailedError(
                    f"Torch-Pruning did not cut {layer!r} as it was asked: {attribute} should be {asked[name]} and is "
                    f"{found.get(name)}; give the layer in ignore"
                )

    def _run(self, model: nn.Module) -> list[Tensor]:
        """Outputs of the example inputs, those that are tensors of floating numbers."""
        try:
            with torch.no_grad():
                outputs = model(*self.inputs)
        except Exception as error:  # whatever the user's forward raises
            raise RunFailedError(
                f"the network that Torch-Pruning cut fails on the example inputs: {type(error).__name__}: {error}"
            ) from error
        return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    # Trying it before anybody relies on it

    def _smallest(self) -> Configuration:
        return tuple(part.widths[0] for part in self.parts)

    def _tried(self) -> nn.Module | None:
        """The network at its smallest; where that fails, None, and each part that fails by itself is refused.

        Raises:
            RunFailedError: It fails, and no part does by itself.
        """
        if not self.parts:
            return None
        try:
            return self._try(self._smallest())
        except RunFailedError as error:
            for place, group in enumerate(self._by_place):
                alone = (*self.dense[:place], self.parts[place].widths[0], *self.dense[place + 1 :])
                try:
                    self._try(alone)
                except RunFailedError as of_part:
                    group.refuse(str(of_part))
                    self._refuse(group)
            if all(group.refusal is None for group in self._by_place):
                raise RunFailedError(f"{error} (each part can be cut by itself, all together cannot)") from error
        return None

    def _try(self, configuration: Configuration) -> nn.Module:
        """Cut, and hold against the dense network in which nothing reads the units that went.

        Raises:
            RunFailedError: As `cut`, or they do not compute the same.
        """
        new = self.cut(configuration)
        masked, tensors = copy.deepcopy(self.model), dict[str, Tensor]()
        tensors.update(named_tensors(masked))
        for width, group, order in zip(configuration, self._by_place, self.orders, strict=True):
            if width == group.size:
                continue
            if group.is_across:
                return new
            for place in group.places:
                if place.is_read:
                    index = place.index[order[width:]].flatten().to(tensors[place.tensor].device)
                    tensors[place.tensor].detach().index_fill_(place.axis, index, 0)
        for ours, theirs in zip(self._run(masked), self._run(new), strict=True):
            if not ours.numel():
                continue
            difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
            largest = ours.abs().max().item()
            if not difference <= largest * max(_TOLERANCE, 8 * torch.finfo(ours.dtype).eps):
                raise RunFailedError(
                    f"what Torch-Pruning cut computes something else than the network without those units (outputs up "
                    f"to {largest:.3g} differ by {difference:.3g}): it takes them from the wrong places, or something "
                    "is computed across them"
                )
        return new
