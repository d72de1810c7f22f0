"""One table of everything that has a name: kind -> name -> "module:object".

Called by the command line (listing) and by everything that turns a name into an object. Listing imports none of
the entries, so `trimtab list` needs no torch. Other packages add entries through entry points of the groups
`trimtab.tasks`, `trimtab.agents`, `trimtab.knobs`, `trimtab.signals`, `trimtab.rewards`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.errors import InputError, unknown_name

__all__ = ["Entry", "add", "added", "adopt", "entries", "import_file", "load", "names"]


@dataclass(frozen=True)
class Entry:
    """One named thing.

    Attributes:
        target: Where it is, "module:object", or "/path/of/file.py:object" where a user named a file.
        description: One line of what it is.
        needs_brain: An agent that was taught before and knows nothing without a brain.
    """

    target: str
    description: str
    needs_brain: bool = False


_TASKS = {
    "digits-mlp": Entry("trimtab.tasks.vision:digits_mlp", "8x8 digits (bundled with scikit-learn), MLP 64-64-10"),
    "digits-cnn": Entry("trimtab.tasks.vision:digits_cnn", "8x8 digits (bundled with scikit-learn), two convolutions"),
    "mnist-mlp": Entry("trimtab.tasks.vision:mnist_mlp", "MNIST (ylecun/mnist), MLP 784-128-10"),
    "mnist-cnn": Entry("trimtab.tasks.vision:mnist_cnn", "MNIST (ylecun/mnist), conv32-conv64-dense"),
    "cifar10-cnn": Entry("trimtab.tasks.vision:cifar10_cnn", "CIFAR-10 (uoft-cs/cifar10), conv32-conv64-dense"),
    "mnist-resnet18": Entry("trimtab.tasks.deep_vision:mnist_resnet18", "MNIST, ResNet-18"),
    "mnist-vgg16": Entry("trimtab.tasks.deep_vision:mnist_vgg16", "MNIST in a black border, VGG-16 with batch norm"),
    "cifar10-resnet18": Entry("trimtab.tasks.deep_vision:cifar10_resnet18", "CIFAR-10, ResNet-18 with a stem of 3x3"),
    "cifar10-vgg16": Entry("trimtab.tasks.deep_vision:cifar10_vgg16", "CIFAR-10, VGG-16 with batch norm"),
    "sst2-mlp": Entry("trimtab.tasks.sentences:sst2_mlp", "SST-2 (nyu-mll/glue), mean of token embeddings, MLP"),
    "sst2-bilstm": Entry("trimtab.tasks.sentences:sst2_bilstm", "SST-2 (nyu-mll/glue), bidirectional LSTM"),
    "sst2-lstm": Entry("trimtab.tasks.recurrent:sst2_lstm", "SST-2, LSTM read behind the last word"),
    "imdb-lstm": Entry("trimtab.tasks.recurrent:imdb_lstm", "IMDb (stanfordnlp/imdb), LSTM read behind the last word"),
    "imdb-bilstm": Entry("trimtab.tasks.recurrent:imdb_bilstm", "IMDb, bidirectional LSTM, both last states"),
    "sst2-bert": Entry("trimtab.tasks.bert:sst2_bert", "SST-2, BERT (full: base, pre-trained; else 2 random layers)"),
    "imdb-bert": Entry("trimtab.tasks.bert:imdb_bert", "IMDb, BERT (full: base, pre-trained; else 2 random layers)"),
    "titanic-fcnn": Entry("trimtab.tasks.tabular:titanic_fcnn", "Titanic passengers (Kaggle train.csv), MLP 64-64"),
    "diabetes-mlp": Entry(
        "trimtab.tasks.diabetes:diabetes_mlp", "442 patients (bundled with scikit-learn), regression"
    ),
    "cifar10-tuning": Entry("trimtab.tasks.tuning:cifar10_tuning", "CIFAR-10, conv64-conv64-dense64, dropout 0.5"),
    "digits-tuning": Entry("trimtab.tasks.tuning:digits_tuning", "8x8 digits, conv64-conv64-dense64, dropout 0.5"),
    "imdb-tuning": Entry("trimtab.tasks.tuning:imdb_tuning", "IMDb (stanfordnlp/imdb), bidirectional LSTM, dense"),
    "sst2-tuning": Entry("trimtab.tasks.tuning:sst2_tuning", "SST-2, the network of imdb-tuning"),
    "titanic-tuning": Entry("trimtab.tasks.tuning:titanic_tuning", "Titanic passengers, MLP 64-64, dropout 0.5"),
    "cifar10-pruning": Entry("trimtab.tasks.pruning:cifar10_pruning", "CIFAR-10, conv32-conv64-dense512, for pruning"),
    "digits-pruning": Entry("trimtab.tasks.pruning:digits_pruning", "8x8 digits, conv16-conv32-dense64, for pruning"),
    "imdb-pruning": Entry("trimtab.tasks.pruning:imdb_pruning", "IMDb, LSTM 128, dense 64, one logit, for pruning"),
    "shakespeare-gpt": Entry("trimtab.tasks.text:shakespeare_gpt", "tiny Shakespeare by characters, small GPT"),
    "enwik8-gpt": Entry("trimtab.tasks.text:enwik8_gpt", "enwik8 by bytes (100 MB of Wikipedia), small GPT"),
    "text8-gpt": Entry("trimtab.tasks.text:text8_gpt", "text8 by characters (cleaned Wikipedia), small GPT"),
}
_AGENTS = {
    "constant": Entry("trimtab.agents.scripted:constant", "the initial rate throughout"),
    "step": Entry("trimtab.agents.scripted:step", "torch's StepLR: x gamma every step_size steps"),
    "exponential": Entry("trimtab.agents.scripted:exponential", "torch's ExponentialLR: x gamma every step"),
    "cosine": Entry("trimtab.agents.scripted:cosine", "linear warm-up, then torch's CosineAnnealingLR"),
    "wsd": Entry("trimtab.agents.scripted:wsd", "warm-up, stable, linear decay"),
    "default-cosine": Entry(
        "trimtab.agents.scripted:default_cosine", "a fixed default rate per optimizer, with cosine"
    ),
    "plateau": Entry("trimtab.agents.scripted:Plateau", "torch's ReduceLROnPlateau"),
    "replay": Entry("trimtab.agents.scripted:Replay", "writes a recorded sequence of settings, without looking"),
    "random": Entry("trimtab.agents.scripted:RandomMoves", "a move drawn at random at every decision"),
    "uwhg": Entry("trimtab.agents.uwhg:UWHG", "rule: update-to-weight ratio first, then hypergradient; no learning"),
    "q_learning": Entry("trimtab.agents.q_learning:QLearning", "tabular Q-learning over binned scale-free signals"),
    "deep_q": Entry("trimtab.agents.deep_q:DeepQ", "deep Q-learning within a run, over factors or a continuous move"),
    "tuner": Entry("trimtab.agents.tuner:TunerAgent", "learns when to intervene, and what to change then (PPO or DQN)"),
    "evolution": Entry(
        "trimtab.agents.evolution:Evolution", "brain: linear policy taught by evolution strategies; readable", True
    ),
    "ppo": Entry("trimtab.agents.policy:PPOAgent", "brain: small network taught by PPO; the mean of its moves", True),
    "dqn": Entry("trimtab.agents.policy:DQNAgent", "brain: small network taught by DQN; its best move", True),
}
_KNOBS = {
    "lr": Entry("trimtab.knobs.optimizer:LearningRate", "learning rate of every param group, ratios kept"),
    "weight_decay": Entry("trimtab.knobs.optimizer:WeightDecay", "weight decay; a group with 0 keeps 0"),
    "momentum": Entry("trimtab.knobs.momentum:Momentum", "momentum of SGD, betas[0] of Adam and its kin"),
    "beta2": Entry("trimtab.knobs.momentum:Beta2", "betas[1] of Adam and its kin"),
    "grad_clip": Entry("trimtab.knobs.clipping:GradClip", "largest norm of the gradient"),
    "optimizer": Entry("trimtab.knobs.switch:OptimizerChoice", "sgd, adam or adamw, with what it remembers"),
    "batch_size": Entry("trimtab.knobs.data:BatchSize", "samples in a batch, in the middle of an epoch"),
    "accumulation": Entry("trimtab.knobs.data:Accumulation", "micro-batches in an optimizer step"),
    "dropout": Entry("trimtab.knobs.model:Dropout", "probability of every dropout in the model"),
    "layers": Entry("trimtab.knobs.layers:Layers", "hidden layers of the network while it trains"),
    "units": Entry("trimtab.knobs.units:Units", "units of the layers of the network while it trains"),
}
_SIGNALS = {
    "train_loss_log_ratio": Entry(
        "trimtab.signals:train_loss_log_ratio", "log of smoothed train loss over the one before"
    ),
    "val_loss_log_ratio": Entry("trimtab.signals:val_loss_log_ratio", "log of validation loss over the one before"),
    "val_loss_log_ratio_best": Entry("trimtab.signals:val_loss_log_ratio_best", "log of validation loss over the best"),
    "loss_slope": Entry("trimtab.signals:loss_slope", "log of the interval's second half of losses over its first"),
    "generalization_gap": Entry("trimtab.signals:generalization_gap", "log of validation loss over train loss"),
    "grad_norm_log_ratio": Entry("trimtab.signals:grad_norm_log_ratio", "log of the gradient norm over the one before"),
    "grad_update_cosine": Entry(
        "trimtab.signals:grad_update_cosine", "cosine between the gradient and the last update"
    ),
    "update_to_weight": Entry("trimtab.signals:update_to_weight", "log10 of the update's norm over the weights' norm"),
    "progress": Entry("trimtab.signals:progress", "share of the budget used"),
    "lr_log_ratio_start": Entry("trimtab.signals:lr_log_ratio_start", "log10 of the rate's level over its start"),
    "lr_unit": Entry("trimtab.signals:lr_unit", "present learning rate on the unit interval of its bounds"),
    "weight_decay_unit": Entry("trimtab.signals:weight_decay_unit", "present weight decay on the unit interval"),
    "momentum_unit": Entry("trimtab.signals:momentum_unit", "present momentum on the unit interval"),
    "beta2_unit": Entry("trimtab.signals:beta2_unit", "present beta2 on the unit interval"),
    "grad_clip_unit": Entry(
        "trimtab.signals:grad_clip_unit", "present norm that gradients are clipped at, on the unit interval"
    ),
    "dropout_unit": Entry("trimtab.signals:dropout_unit", "present dropout on the unit interval"),
    "batch_size_unit": Entry("trimtab.signals:batch_size_unit", "present batch size on the unit interval"),
    "accumulation_unit": Entry(
        "trimtab.signals:accumulation_unit", "present number of micro-batches on the unit interval"
    ),
    "layers_unit": Entry("trimtab.signals:layers_unit", "present number of hidden layers on the unit interval"),
    "units_unit": Entry("trimtab.signals:units_unit", "present number of units on the unit interval"),
    "optimizer_unit": Entry("trimtab.signals:optimizer_unit", "place of the present optimizer among its choices"),
    "turn": Entry("trimtab.signals:turn", "place of the knob whose turn it is, where they move in turn"),
    "interval_loss_log_ratio": Entry(
        "trimtab.signals:interval_loss_log_ratio", "log of the interval's train loss over the one before"
    ),
    "val_loss_log_ratio_start": Entry(
        "trimtab.signals:val_loss_log_ratio_start", "log of validation loss over the first one"
    ),
    "has_val_loss": Entry("trimtab.signals:has_val_loss", "whether a validation loss was measured in the interval"),
    "loss_noise": Entry("trimtab.signals:loss_noise", "log of the train losses' spread within the interval"),
    "update_to_weight_min": Entry("trimtab.signals:update_to_weight_min", "update_to_weight of the slowest layer"),
    "update_to_weight_median": Entry("trimtab.signals:update_to_weight_median", "update_to_weight of the median layer"),
    "update_to_weight_max": Entry("trimtab.signals:update_to_weight_max", "update_to_weight of the fastest layer"),
    "last_move": Entry("trimtab.signals:last_move", "log10 of the factor of the rate's last move"),
    "rollback_memory": Entry("trimtab.signals:rollback_memory", "1 after a roll-back, fading"),
    "lr_log_ratio_bad": Entry(
        "trimtab.signals:lr_log_ratio_bad", "log10 of the rate's level over the lowest that was rolled back"
    ),
    "interval_log_ratio": Entry(
        "trimtab.signals:interval_log_ratio", "log of the interval's steps over those of an ordinary one"
    ),
    "budget_log_steps": Entry("trimtab.signals:budget_log_steps", "log10 of the budget in optimizer steps over 300"),
    "watched_loss": Entry("trimtab.signals:watched_loss", "validation loss, or train loss where there is none (raw)"),
}
_REWARDS = {
    "negative_loss": Entry("trimtab.rewards:negative_loss", "minus the loss"),
    "improvement": Entry("trimtab.rewards:improvement", "drop of the validation loss since the last decision"),
    "log_improvement": Entry("trimtab.rewards:log_improvement", "drop of the log of the loss since the last decision"),
    "accuracy_improvement": Entry(
        "trimtab.rewards:accuracy_improvement", "rise of the accuracy since the last decision"
    ),
    "score_rank": Entry("trimtab.rewards:score_rank", "rank among the runs of a task at the end of the episode"),
}
_TABLES: dict[str, dict[str, Entry]] = {
    "task": _TASKS,
    "agent": _AGENTS,
    "knob": _KNOBS,
    "signal": _SIGNALS,
    "reward": _REWARDS,
}
_added: dict[tuple[str, str], tuple[str, str]] = {}  # (kind, name) -> target and description


def entries(kind: str) -> Mapping[str, Entry]:
    """Every entry of a kind, ours and those of installed packages, without importing any of them.

    Args:
        kind: "task", "agent", "knob", "signal" or "reward".

    Raises:
        UnknownNameError: The kind is none of these.
    """
    if kind not in _TABLES:
        raise unknown_name("kind of thing", kind, _TABLES)
    return {**_of_packages(kind), **_TABLES[kind]}


@functools.cache
def _of_packages(kind: str) -> dict[str, Entry]:
    """Entries of installed packages; reading their metadata takes milliseconds, and it does not change while we run."""
    return {
        point.name: Entry(point.value, f"from {point.dist.name if point.dist else 'a package'}")
        for point in metadata.entry_points(group=f"trimtab.{kind}s")
    }


def names(kind: str) -> list[str]:
    """Sorted names of a kind."""
    return sorted(entries(kind))


def load(kind: str, name: str) -> Any:
    """Import and return the object behind a name.

    Raises:
        UnknownNameError: Nothing of this kind has this name.
    """
    table = entries(kind)
    if name not in table:
        raise unknown_name(kind, name, table)
    module, _, attribute = table[name].target.rpartition(":")
    return getattr(import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), attribute)


def import_file(path: Path) -> ModuleType:
    """Import a Python file that a user named; once in a process.

    Args:
        path: Of the file, absolute. It is run as it is: whoever names it trusts it.

    Raises:
        InputError: It is not there, or raises when it is imported; says in which line.
    """
    name = f"trimtab_own_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"there is no Python file {path}; give FILE.py:NAME")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        del sys.modules[name]
        raise InputError(f"{path} cannot be imported{_line(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _line(error: BaseException, path: Path) -> str:
    """Where in a file an error came from, as far as it is known."""
    if isinstance(error, SyntaxError):
        return ""  # its text has the line
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" (line {frames[-1]})" if frames else ""


def add(kind: str, name: str, target: str, description: str = "") -> None:
    """Register a name for this process and the workers that it starts later; packages use entry points.

    Args:
        kind: "task", "agent", "knob", "signal" or "reward".
        name: Under which it is found.
        target: Where it is, "module:object" or "/path/of/file.py:object".
        description: One line of what it is.

    Raises:
        InputError: The name is taken.
    """
    if name in entries(kind):
        raise InputError(f"{kind} {name!r} is registered already; choose another name")
    _TABLES[kind][name] = Entry(target, description)
    _added[kind, name] = target, description


def added() -> list[list[str]]:
    """Everything that was added in this process, as kind, name, target and description: for `adopt` in another one."""
    return [[*key, *value] for key, value in _added.items()]


def adopt(rows: Iterable[Sequence[str]]) -> None:
    """Add what `added` said in the process that started this one; what is there already is replaced.

    Args:
        rows: Kind, name, target and description of each.
    """
    for kind, name, target, description in rows:
        _TABLES[kind][name] = Entry(target, description)
        _added[kind, name] = target, description
