"""Recipe: all that a brain is made from, as a YAML file that people write.

Called by `learn` and by the command line, which lists recipes without importing torch: what names in a recipe stand
for is looked up in `parts`, not here.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trimtab.errors import InputError, unknown_name
from trimtab.yaml_files import Count, Natural, Options, Positive, Strict, Text, check, number, read_yaml

__all__ = ["Recipe", "SpecPart", "TasksPart", "ValidatePart", "load_recipe", "recipe_names"]

_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
_NEEDS = "every recipe needs recipe, idea, learner, iterations and tasks"


def _share(value: Any) -> float:
    share = number(value)
    if not 0 <= share <= 1:
        raise ValueError(f"got {value}, expected a share in [0, 1]")
    return share


_Share = Annotated[float, BeforeValidator(_share)]
_Number = Annotated[float, BeforeValidator(number)]
_Families = Annotated[tuple[Text, ...], Field(min_length=1)]


class SpecPart(Strict):
    """What the agent observes, how it acts, when, and what it is rewarded for; None is the agent's own.

    Attributes:
        knobs: Names of the knobs that are moved together, "lr" first. With more than one, a knob is left out in the
            runs where it cannot act (`ControlSpec.masks`), and every run has its budget in training FLOPs.
        knob_options: Options of knobs, such as their bounds, by name.
        n_decisions: Decisions after the early ones, in equal parts of the budget.
        early_decisions: Decisions of 1 % of the budget at the start.
        base: Name of the schedule under it.
        signals: Names of the signals; None adds to the agent's own the present level of every knob but the rate.
        reward: Name of the reward.
        penalty: See `ControlSpec.penalty`.
    """

    knobs: Annotated[tuple[Text, ...], Field(min_length=1)] = ("lr",)
    knob_options: dict[str, Options] = Field(default_factory=dict)
    n_decisions: Count = 20
    early_decisions: Natural | None = None
    base: Text = "cosine"
    signals: tuple[Text, ...] | None = None
    reward: Text = "score_rank"
    penalty: _Number = 0.0


class CurriculumPart(Strict):
    """What learning begins with; all else is as in the episodes after it.

    Attributes:
        share: Of the recipe's iterations, the first ones.
        horizon: Their least and largest budget in optimizer steps.
    """

    share: _Share
    horizon: tuple[Count, Count]


class TasksPart(Strict):
    """What episodes are drawn from; see `EpisodeOptions`, whose defaults these are.

    Attributes:
        curriculum: Other horizons in the first iterations, which short ones make cheap; None for none.
    """

    families: _Families
    runs_per_task: Count = 16
    horizon: tuple[Count, Count] = (50, 2000)
    max_cnn_horizon: Count = 500
    train_rows: tuple[Count, Count] | None = None
    initial_lr: tuple[Positive, Positive] = (1e-5, 1e-1)
    no_validation: _Share = 0.25
    some_validation: _Share = 0.25
    curriculum: CurriculumPart | None = None


class ValidatePart(Strict):
    """Validation: fresh tasks, the same at every validation, that no learner meets.

    Attributes:
        every: Iterations between two validations; there is always one before the first iteration and after the last.
        families: Families by which the choice is made; None for those that are trained on.
        held_out: Families that are never trained on, shown beside and not chosen by.
        num_envs: Runs in each family and episode.
        episodes: Episodes in each family, at every look.
        choose_episodes: The same where the choice is made; None for as many. A few dozen tasks cannot tell agents
            apart that differ by less than a tenth.
        runs_per_task: Runs of each task, which differ in their initial rate.
    """

    every: Count = 20
    families: _Families | None = None
    held_out: tuple[Text, ...] = ()
    num_envs: Count = 32
    episodes: Count = 4
    choose_episodes: Count | None = None
    runs_per_task: Count = 4


class Recipe(Strict):
    """A whole recipe.

    Attributes:
        recipe: Its name, and that of its folder, runs/learn-NAME.
        idea: What it is for, in a sentence or two.
        learner: "ppo", "dqn" or "evolution".
        options: Of the agent and of the learner; PPO's and DQN's `iterations` are those of the recipe, and the
            `group_size` of evolution strategies is `tasks.runs_per_task`, where they are not given.
        spec: See `SpecPart`.
        tasks: What is trained on; see `TasksPart`.
        num_envs: Runs trained in each iteration.
        iterations: Iterations of each learner; in each, every run plays one episode.
        seeds: Learners, each with a seed of its own.
        validate_on: See `ValidatePart`; the key is `validate`.
        choose: "best": the single agent that is best on validation tasks; "ensemble": the mean of one agent of each
            learner; "best-or-ensemble": whichever is better on validation tasks.
        keep_ranges: Whether the brain lets the rule `uwhg` decide where a signal lies outside what its members saw
            while they were taught; so it is judged, too. False trusts it everywhere.
    """

    recipe: Annotated[str, Field(pattern=rf"^{_NAME}$")]
    idea: Text
    learner: Literal["ppo", "dqn", "evolution"]
    options: Options = Field(default_factory=dict)
    spec: SpecPart = SpecPart()
    tasks: TasksPart
    num_envs: Count = 256
    iterations: Count
    seeds: Count = 1
    validate_on: Annotated[ValidatePart, Field(alias="validate")] = ValidatePart()
    choose: Literal["best", "ensemble", "best-or-ensemble"] = "best"
    keep_ranges: Annotated[bool, Field(strict=True)] = False

    def to_json(self) -> dict[str, Any]:
        """As it would stand in a file, with every default written out, but of what was added later.

        So that brains whose making began before can be finished.
        """
        data = self.model_dump(mode="json", by_alias=True)
        for key in ("knobs", "knob_options"):
            if key not in self.spec.model_fields_set:
                del data["spec"][key]
        for key in ("train_rows", "curriculum"):
            if key not in self.tasks.model_fields_set:
                del data["tasks"][key]
        return data

    @property
    def choosing_families(self) -> tuple[str, ...]:
        """Families by whose validation tasks agents are chosen, each once."""
        return tuple(dict.fromkeys(self.validate_on.families or self.tasks.families))


def recipe_names() -> dict[str, Path]:
    """The recipes that come with trimtab: name -> file."""
    folder = Path(str(resources.files("trimtab.learning") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def load_recipe(
    name_or_path: str | Path,
    *,
    iterations: int | None = None,
    seeds: int | None = None,
    num_envs: int | None = None,
) -> Recipe:
    """Read a recipe and change what the caller asks for.

    Args:
        name_or_path: One of ours, or a YAML file.
        iterations: Instead of the recipe's.
        seeds: Instead of the recipe's.
        num_envs: Instead of the recipe's.

    Raises:
        UnknownNameError: No such recipe, or a key of it that is not known.
        InputError: The file cannot be read, or says something wrong.
    """
    path = _find(name_or_path)
    data = read_yaml(path, "recipe", "recipe, idea, learner, iterations and tasks")
    # Checked as it stands first, so that an error in the file is not taken for one on the command line.
    recipe = check(Recipe, data, path.name, needs=_NEEDS)
    given = {"iterations": iterations, "seeds": seeds, "num_envs": num_envs}
    changes = {key: value for key, value in given.items() if value is not None}
    return check(Recipe, {**data, **changes}, "options", needs=_NEEDS) if changes else recipe


def _find(name_or_path: str | Path) -> Path:
    names, path = recipe_names(), Path(name_or_path)
    if str(name_or_path) in names:
        return names[str(name_or_path)]
    if path.suffix not in (".yaml", ".yml"):
        raise unknown_name("recipe", name_or_path, names)
    if not path.is_file():
        raise InputError(f"there is no recipe file {path}; give a file that is there, or one of: {', '.join(names)}")
    return path
