"""PrunableNetwork: a trained network, the choices there are, what each would cost, and the cut itself.

Called by `trimtab.pruner` and by the environment `trimtab/Pruning-v0`. Nothing is passed over in silence: `refused`
names every layer whose units have to stay, and why.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.cost import as_inputs, count_by_module
from trimtab.errors import InputError, unknown_name
from trimtab.pruning import attention
from trimtab.pruning.calibration import recalibrate
from trimtab.pruning.costs import ClosedForm, Counts, Factor, Term, terms_of_couplings
from trimtab.pruning.importance import IMPORTANCE, random_scores, ranked, unit_scores
from trimtab.pruning.parts import Configuration, Part, check_configuration, width_grid
from trimtab.pruning.slicing import Slicer
from trimtab.surgery.couplings import Couplings, Group
from trimtab.surgery.layers import Removal, removals
from trimtab.surgery.layout import Layout
from trimtab.surgery.module_rules import KNOWN
from trimtab.surgery.trace import trace

__all__ = ["LocalCut", "PrunableNetwork", "copied", "units_of"]


@dataclass(frozen=True)
class LocalCut:
    """A part inside one of torch's transformer modules, which the couplings of the network do not reach.

    Attributes:
        module: Dotted name of the module.
        kind: "heads" or "feed-forward".
    """

    module: str
    kind: str


@dataclass(frozen=True)
class _Way:
    """How a part is cut: by its set of units, or locally; and how its layer would be taken out."""

    space: int | None = None
    local: LocalCut | None = None
    removal: Removal | None = None
    source: Layout | None = None  # what it reads: the places on this axis would go on in the place of its units


class PrunableNetwork:
    """What can be pruned of one network.

    Args:
        model: Trained; it is copied and never touched.
        example_inputs: A tensor, or a tuple of the forward's positional arguments. FLOPs are those of this batch.
        multiple: Widths are multiples of it, but for narrow parts and the dense width: see `parts.width_grid`.
        importance: One of `trimtab.pruning.importance.IMPORTANCE`; which units go first.
        ignore: Names of layers whose units stay.
        removal: Whether layers may be taken out where they make as much as they read.
        seed: Of the importance "random".

    Attributes:
        model: A copy of the dense network, in evaluation.
        inputs: The example inputs as positional arguments.
        parts: In the order of the forward.
        refused: Layer -> why its units have to stay.
        dense: The configuration in which everything stays.
        scores: (units,) of each part.
        orders: (units,) of each part, the most important first.
        couplings: Of the dense network.
        slicer: Makes smaller copies.
        costs: FLOPs and parameters by configuration.
        calibration: Batches of inputs that the batch-norm statistics of every cut are taken anew of; () leaves them as
            they are in the dense network.

    Raises:
        InputError: The network cannot be copied or traced, fails on the inputs, nothing of it can be pruned, or an
            argument is none.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object,
        *,
        multiple: int = 8,
        importance: str = "l2",
        ignore: Collection[str] = (),
        removal: bool = True,
        seed: int = 0,
    ) -> None:
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise InputError(f"multiple is {multiple!r}; expected a whole number of 1 or more, 8 for fast kernels")
        if importance not in IMPORTANCE:
            raise unknown_name("importance", importance, IMPORTANCE)
        self.inputs = as_inputs(example_inputs)
        self.model = copied(model)
        self.calibration: Sequence[tuple[Tensor, ...]] = ()
        self.couplings = Couplings(trace(self.model, self.inputs))
        self.slicer = Slicer(self.couplings)
        self.refused: dict[str, str] = {}
        found = [*self._units(multiple, ignore, removal), *self._inside_transformers(multiple, ignore)]
        names = {name for part, _ in found for name in (part.name, *part.layers)} | set(self.refused)
        for name in ignore:
            if name not in names:
                raise unknown_name("layer to ignore", name, sorted(names))
        if not found:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise InputError(f"nothing of {type(model).__name__} can be pruned: {reasons or 'it has no layers'}")
        places = {node.target: place for place, node in enumerate(self.couplings.trace.graph.nodes)}
        found.sort(key=lambda pair: _place(pair[0].name, places))
        self.parts = tuple(part for part, _ in found)
        self.ways = tuple(way for _, way in found)
        self.dense: Configuration = tuple(part.size for part in self.parts)
        score = partial(self._scores, kind=importance, seed=seed)
        self.scores = tuple(score(part, way) for part, way in found)
        self.orders = tuple(ranked(scores) for scores in self.scores)
        counts = count_by_module(copied(self.model), self.inputs)  # with gradients, which computed weights would keep
        self.costs = ClosedForm(self.model, counts, self.dense, self._terms(counts))
        self._kept: dict[tuple[int, int], Tensor] = {}

    # What there is

    def _units(self, multiple: int, ignore: Collection[str], removal: bool) -> list[tuple[Part, _Way]]:
        c = self.couplings
        gone = {found.name: found for found in removals(c)[0]} if removal else {}
        parts = []
        for group in c.groups:
            reason = group.refusal or _ignored(group.producers, ignore)
            widths = width_grid(group.size, multiple)
            space = c.space_of(group)
            way = self._way_out(group, gone, space)
            if way.removal is not None:
                widths = (0, *widths)
            if reason is None and len(widths) < 2:
                reason = "it has one unit"
            if reason is not None:
                self.refused |= dict.fromkeys(group.producers, reason)
                continue
            parts.append((Part(group.name, group.kind, group.size, widths, group.producers), way))
        known = {slot.module for slot in c.slots}
        inside = {*attention.attentions(self.model), *attention.feed_forwards(self.model)}
        for name, module in self.model.named_modules():
            has_own = any(True for _ in module.parameters(recurse=False))
            within = any(name == held or name.startswith(f"{held}.") for held in inside)
            if has_own and module not in known and not within:
                why = f"no rule says what the units of {type(module).__name__} are coupled to"
                if name and type(module) in KNOWN and not c.trace.calls[module]:
                    why = "the forward never calls it"
                self.refused.setdefault(name, why)
        return parts

    def _way_out(self, group: Group, gone: Mapping[str, Removal], space: int) -> _Way:
        """The layer can go where it alone makes its units: then what it reads goes on in their place."""
        removal = gone.get(group.name)
        if removal is None or len(group.producers) > 1:
            return _Way(space)
        if any(type(new) is not nn.Identity for _, new in removal.replacements):  # one that `Surgeon.deepen` put in
            return _Way(space)
        c = self.couplings
        module = c.trace.modules[group.name]
        return _Way(space, None, removal, next(s.layout for s in c.slots if s.module is module and s.role == "reads"))

    def _inside_transformers(self, multiple: int, ignore: Collection[str]) -> list[tuple[Part, _Way]]:
        self.refused |= attention.refused(self.model)
        parts = []
        for name, module in attention.attentions(self.model).items():
            way = _Way(local=LocalCut(name, "heads"))
            parts.append((Part(name, "heads", module.num_heads, width_grid(module.num_heads, 1), (name,)), way))
        for name, layer in attention.feed_forwards(self.model).items():
            size = layer.linear1.out_features
            way = _Way(local=LocalCut(name, "feed-forward"))
            parts.append((Part(f"{name}.linear1", "feed-forward", size, width_grid(size, multiple), (name,)), way))
        found = []
        for part, way in parts:
            reason = _ignored((part.name, *part.layers), ignore)
            if reason is None and len(part.widths) < 2:
                reason = f"it has one {'head' if part.kind == 'heads' else 'unit'}"
            if reason is None:
                found.append((part, way))
            else:
                self.refused[part.name] = reason
        return found

    def _scores(self, part: Part, way: _Way, kind: str, seed: int) -> Tensor:
        if way.space is not None:
            c = self.couplings
            slots = [slot for slot in c.slots if way.space in c.spaces.in_layout(slot.layout)]
            return unit_scores(slots, c.spaces, way.space, kind, seed=seed, name=part.name)
        if kind == "random":
            return random_scores(part.size, seed, part.name)
        if part.kind == "heads":
            return attention.head_importance(attention.attentions(self.model)[part.layers[0]])
        return attention.unit_importance(attention.feed_forwards(self.model)[part.layers[0]])

    def _terms(self, counts: Counts) -> list[Term]:
        """Everything that costs something for each unit; the rest of the network is a constant."""
        places = {way.space: place for place, way in enumerate(self.ways) if way.space is not None}
        terms = terms_of_couplings(self.couplings, counts, places)
        for place, (part, way) in enumerate(zip(self.parts, self.ways, strict=True)):
            if way.local is not None:
                terms.append(self._local_term(part, way.local, place, counts))
        owners = {name: place for place, way in enumerate(self.ways) for name in _taken(way)}
        return [term.owned_by(owners.get(term.module)) for term in terms]

    def _local_term(self, part: Part, local: LocalCut, place: int, counts: Counts) -> Term:
        """Heads and feed-forward units cost so much each; the bias of what reads them is no unit's."""
        module: Any = self.model.get_submodule(local.module)
        if local.kind == "heads":
            flops, read_bias = counts.get(local.module, 0), module.out_proj.bias
            n = sum(parameter.numel() for parameter in module.parameters())
        else:
            flops = sum(counts.get(f"{local.module}.{name}", 0) for name in ("linear1", "linear2"))
            read_bias = module.linear2.bias
            n = sum(p.numel() for layer in (module.linear1, module.linear2) for p in layer.parameters())
        n -= 0 if read_bias is None else read_bias.numel()
        return Term(local.module, (Factor(0, {place: 1}), Factor()), flops / part.size, n // part.size)

    # What it costs

    def flops(self, configuration: Sequence[int]) -> int:
        """FLOPs of a forward pass of the example inputs; two a multiply-add."""
        return self.costs.flops(self.effective(configuration))

    def parameters(self, configuration: Sequence[int]) -> int:
        """Numbers in all parameters."""
        return self.costs.parameters(self.effective(configuration))

    # What stays

    def effective(self, configuration: Sequence[int]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Width of each part's units as the layers behind it see them, and whether its layer is there.

        Where a layer is taken out, the units that it read go on in the place of those that it made.
        """
        checked = check_configuration(configuration, self.parts)
        widths: list[int] = []
        known: dict[int, int] = {}
        for width, way in zip(checked, self.ways, strict=True):
            if width == 0 and way.source is not None:
                width = self.slicer.size(way.source, known)
            widths.append(width)
            if way.space is not None:
                known[way.space] = width
        return tuple(widths), tuple(width > 0 for width in checked)

    def kept(self, configuration: Sequence[int], orders: Sequence[Tensor] | None = None) -> dict[int, Tensor]:
        """Set of units -> places that stay, ascending; sets that stay whole are not named.

        Args:
            configuration: A width for each part.
            orders: Units by importance, instead of `orders`.
        """
        by_space: dict[int, Tensor] = {}
        for place, (width, part, way) in enumerate(
            zip(check_configuration(configuration, self.parts), self.parts, self.ways, strict=True)
        ):
            if way.space is None:
                continue
            if width == 0 and way.source is not None:
                read = self.slicer.places(way.source, by_space)
                if read is not None:
                    by_space[way.space] = read
            elif width < part.size:
                by_space[way.space] = self.first(place, width) if orders is None else _first(orders[place], width)
        return by_space

    def first(self, place: int, width: int) -> Tensor:
        """The most important units of a part, ascending."""
        key = (place, width)
        if key not in self._kept:
            self._kept[key] = _first(self.orders[place], width)
        return self._kept[key]

    # The cut

    def replacements(self, configuration: Sequence[int]) -> dict[str, nn.Module]:
        """What stands in the place of layers that are taken out."""
        pairs = zip(configuration, self.ways, strict=True)
        gone = [way.removal for width, way in pairs if width == 0 and way.removal is not None]
        return {name: copy.deepcopy(new) for removal in gone for name, new in removal.replacements}

    def cut(self, configuration: Sequence[int], orders: Sequence[Tensor] | None = None) -> nn.Module:
        """A copy of the network with the configuration's widths, in evaluation.

        Args:
            configuration: A width for each part; 0 takes the layer out.
            orders: Units of each part by importance, instead of `orders`.
        """
        kept = self.kept(configuration, orders)
        new = self.slicer.network(self.model, kept, self.replacements(configuration))
        used = self.orders if orders is None else orders
        for width, part, way, order in zip(configuration, self.parts, self.ways, used, strict=True):
            if way.local is not None and width < part.size:
                self.cut_locally(new, way.local, _first(order, width).tolist())
        new.eval()
        if self.calibration and tuple(configuration) != self.dense:
            recalibrate(new, self.calibration)
        return new

    @staticmethod
    def cut_locally(model: nn.Module, local: LocalCut, kept: Sequence[int]) -> None:
        """Cut heads or feed-forward units of one module in place."""
        cut = attention.cut_heads if local.kind == "heads" else attention.cut_feed_forward
        cut(model, local.module, kept)

    def smallest(self) -> Configuration:
        """Every part at its smallest width."""
        return tuple(part.widths[0] for part in self.parts)


def units_of(model: nn.Module, part: Part) -> int:
    """Units of a part that a pruned network has; 0 where its layer was taken out.

    Args:
        model: Cut from the network that the part is of, once or several times.
        part: Of the dense network.
    """
    module: Any = model.get_submodule(part.name)
    if isinstance(module, nn.Identity):
        return 0
    if part.kind == "heads":
        return int(module.num_heads)
    if isinstance(module, nn.Embedding):
        return int(module.embedding_dim)
    if isinstance(module, nn.modules.conv._ConvNd):  # whose weight has them on another axis where it is transposed
        return int(module.out_channels)
    return int(module.hidden_size if isinstance(module, nn.RNNBase) else module.weight.shape[0])


def copied(model: nn.Module) -> nn.Module:
    """A copy of a user's network, in evaluation.

    Raises:
        InputError: It is no network, or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}; expected a trained torch.nn.Module")
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:  # whatever a user's module does when it is copied
        raise InputError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pruning works on copies: "
            "remove hooks that keep tensors, or finish torch.nn.utils.prune with prune.remove, weight_norm with "
            "remove_weight_norm"
        ) from error


def _ignored(names: Sequence[str], ignore: Collection[str]) -> str | None:
    return "it was asked to stay (ignore)" if any(name in ignore for name in names) else None


def _first(order: Tensor, width: int) -> Tensor:
    return torch.sort(order[:width]).values


def _taken(way: _Way) -> list[str]:
    """Modules that are no more when a part's layer is taken out."""
    return [] if way.removal is None else [name for name, _ in way.removal.replacements]


def _place(name: str, places: Mapping[object, int]) -> int:
    """Place in the forward of a module, or of the module that it lies in."""
    while name not in places and "." in name:
        name = name.rpartition(".")[0]
    return places.get(name, len(places))
