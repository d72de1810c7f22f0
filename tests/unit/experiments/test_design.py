"""Study files: what they may say, what they resolve to, and what is said of a wrong one."""

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.agents.epsilon_greedy import FACTORS
from trimtab.errors import InputError, UnknownNameError
from trimtab.experiments.design import load_study, study_names
from trimtab.experiments.schema import parse_study
from trimtab.yaml_files import read_yaml

GOOD = """
study: mine
idea: a test
tasks: [digits-mlp]
arms: [constant, q_learning]
"""


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_rate_written_as_1e_minus_3_is_a_number(tmp_path):
    text = GOOD + "lr: 1e-3\nsensitivity_lrs: [1e-4, 1.0e-2]\nweight_decay: 1e-1\n"
    assert read_yaml(write(tmp_path, text))["lr"] == "1e-3"  # what PyYAML makes of it
    study = load_study(write(tmp_path, text))
    assert study.arms[0].lr == {"digits-mlp": 1e-3}
    assert study.sensitivity_lrs == (1e-4, 1e-2)
    assert study.settings["weight_decay"] == 0.1


def test_defaults(tmp_path):
    study = load_study(write(tmp_path, GOOD))
    assert (study.n_seeds, study.root_seed, study.scale, study.tuning) == (5, 0, "small", None)
    assert study.arms[0].lr == {"digits-mlp": None}
    assert [(arm.id, arm.kind, arm.base) for arm in study.arms] == [
        ("constant", "baseline", None),
        ("q_learning", "learned", "constant"),
    ]
    assert study.settings == {
        "total_steps": None,
        "every": None,
        "weight_decay": None,
        "optimizer": None,
        "device": "cpu",
        "precision": "float32",
        "threads": 1,
    }


def test_an_arm_written_out(tmp_path):
    text = GOOD + "reward: negative_loss\nlearn_runs: 4\n"
    text = text.replace(
        "arms: [constant, q_learning]",
        "arms:\n  - {id: fast, agent: q_learning, base: cosine, options: {epsilon: 0.2},"
        " lr: {digits-mlp: 0.01}, reward: improvement, learn_runs: 0}\n  - placebo:fast\n  - yoked:fast",
    )
    fast, placebo, yoked = load_study(write(tmp_path, text)).arms
    assert (fast.agent, fast.kind, fast.base, fast.options) == (
        "q_learning",
        "learned",
        "cosine",
        {"epsilon": 0.2},
    )
    assert (fast.lr, fast.reward, fast.learn_runs) == ({"digits-mlp": 0.01}, "improvement", 0)
    assert (placebo.agent, placebo.kind, placebo.of, placebo.options) == (
        "q_learning",
        "placebo",
        "fast",
        fast.options,
    )
    assert (yoked.agent, yoked.kind, yoked.of, yoked.base, yoked.lr) == (
        "replay",
        "yoked",
        "fast",
        "cosine",
        fast.lr,
    )


def test_a_taught_agent_has_a_brain_and_no_learning_runs(tmp_path):
    text = GOOD.replace("[constant, q_learning]", f"[q_learning, {{id: a, agent: ppo, brain: {tmp_path}/b}}]")
    study = load_study(write(tmp_path, text + "learn_runs: 4\n"))
    assert [arm.learn_runs for arm in study.arms] == [4, 0]
    assert study.arms[1].brain == str(tmp_path / "b")


def test_a_taught_agent_may_have_a_brain_by_name_and_be_taught_on(tmp_path):
    arms = "[{id: a, agent: ppo, brain: default, base: cosine}, {id: b, agent: ppo, brain: default, learn_runs: 3}]"
    study = load_study(write(tmp_path, GOOD.replace("[constant, q_learning]", arms) + "reward: improvement\n"))
    assert [(arm.brain, arm.base, arm.reward, arm.learn_runs) for arm in study.arms] == [
        ("default", "cosine", None, 0),
        ("default", None, None, 3),
    ]


def test_a_preset_gives_options_that_an_arm_may_change(tmp_path):
    arms = "[{id: a, agent: q_learning, preset: paper}, {id: b, agent: deep_q, preset: paper, options: {gamma: 0.5}}]"
    study = load_study(write(tmp_path, GOOD.replace("[constant, q_learning]", arms)))
    a, b = (arm.options for arm in study.arms)
    assert (a["gamma"], a["learning_rate"], a["epsilon"], a["every"]) == (0.99, 1e-4, 0.1, "epoch")
    assert b == {**a, "gamma": 0.5}
    assert FACTORS[a["actions"]] == (0.9, 1.0, 1.1)


def test_prodigy_has_no_rate_and_schedule_free_has_one(tmp_path):
    arms = "[{id: a, agent: cosine, own_optimizer: prodigy}, {id: b, agent: constant, own_optimizer: schedule-free}]"
    study = load_study(write(tmp_path, GOOD.replace("[constant, q_learning]", arms) + "lr: 0.01\n"))
    assert [arm.lr["digits-mlp"] for arm in study.arms] == [None, 0.01]
    assert [arm.has_rate for arm in study.arms] == [False, True]
    assert [arm.kind for arm in study.arms] == ["baseline", "baseline"]


def test_default_cosine_brings_its_own_rate(tmp_path):
    text = GOOD.replace("[constant", "[default-cosine, constant") + "lr: 0.01\n"
    assert [arm.lr["digits-mlp"] for arm in load_study(write(tmp_path, text)).arms] == [None, 0.01, 0.01]


def test_benchmark_tasks_get_the_first_tasks_rate(tmp_path):
    text = GOOD + "lr: {digits-mlp: 0.02}\nbenchmark_tasks: [digits-cnn]\n"
    assert load_study(write(tmp_path, text)).arms[0].lr == {"digits-mlp": 0.02, "digits-cnn": 0.02}


def test_a_scale_overrides_and_all_scales_are_checked(tmp_path):
    text = GOOD + "scales: {smoke: {n_seeds: 2, total_steps: 30}}\n"
    assert load_study(write(tmp_path, text), scale="smoke").n_seeds == 2
    assert load_study(write(tmp_path, text), scale="small").n_seeds == 5
    bad = GOOD + "scales: {full: {n_seeds: many}}\n"
    with pytest.raises(InputError, match=r"mine.yaml: scales.full.n_seeds: got 'many', expected a whole number"):
        load_study(write(tmp_path, bad), scale="smoke")


def test_what_the_caller_asks_for(tmp_path):
    path = write(tmp_path, GOOD + "optional_tasks: [text8-gpt]\nbenchmark_tasks: [digits-cnn]\n")
    study = load_study(path, tasks=["digits-cnn"], arms=["uwhg", "yoked:q_learning"], n_seeds=3, seed=7)
    assert study.tasks == ("digits-cnn",)
    assert study.optional_tasks == study.benchmark_tasks == ()
    assert [arm.id for arm in study.arms] == ["uwhg", "yoked:q_learning"]
    assert [arm.id for arm in study.support] == ["q_learning"]
    assert (study.n_seeds, study.root_seed) == (3, 7)


def test_the_tuned_arm_is_there_only_where_it_is_asked_for(tmp_path):
    text = GOOD + "tuning: {arm: cosine, lrs: [1e-1, 1e-2], n_seeds: 2}\n"
    tuning = load_study(write(tmp_path, text)).tuning
    assert (tuning.arm.id, tuning.arm.kind, tuning.lrs, tuning.n_seeds) == (
        "tuned-cosine",
        "baseline",
        (0.01, 0.1),
        2,
    )
    assert load_study(write(tmp_path, text), arms=["constant"]).tuning is None
    assert load_study(write(tmp_path, text), arms=["constant", "tuned-cosine"]).tuning == tuning


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("n_seeds: 0", "mine.yaml: n_seeds: got 0, expected a whole number of at least 1"),
        ("n_seeds: five", "mine.yaml: n_seeds: got 'five', expected a whole number of at least 1"),
        ("n_seeds: true", "mine.yaml: n_seeds: got True, expected a whole number of at least 1"),
        ("n_seeds: 2.5", "mine.yaml: n_seeds: got 2.5, expected a whole number of at least 1"),
        ("lr: 0", "mine.yaml: lr: got 0, expected a number above 0, or a mapping"),
        ("lr: -1e-3", "mine.yaml: lr: got -1e-3, expected a number above 0"),
        ("lr: .nan", "mine.yaml: lr: got nan, expected a finite number"),
        ("lr: 1e999", "mine.yaml: lr: got 1e999, expected a finite number"),
        (
            "lr: fast",
            "mine.yaml: lr: got 'fast', expected a number, or a mapping from tasks to numbers, or 'task'",
        ),
        ("lr: {digits-mlp: 0}", "mine.yaml: lr: got 0, expected a number above 0"),
        ("lr: {digits-cnn: 1}", "mine.yaml: lr: no rate for the task 'digits-mlp'; give a number, or 'task'"),
        ("lr: {digits: 1, digits-mlp: 1}", "unknown task in lr of mine.yaml 'digits'; did you mean 'digits-"),
        ("lr: true", "mine.yaml: lr: got True, expected a number"),
        ("learning_rate: 0.1", "unknown key in mine.yaml 'learning_rate'; did you mean 'lr'? known: arms,"),
        ("sensitivity_lrs: [0.1, inf]", "mine.yaml: sensitivity_lrs.1: got inf, expected a finite number"),
        ("sensitivity_lrs: 0.1", "mine.yaml: sensitivity_lrs: got 0.1, expected a valid tuple"),
        ("weight_decay: -1", "mine.yaml: weight_decay: got -1, expected 0 or more"),
        (
            "every: sometimes",
            "mine.yaml: every: got 'sometimes', expected a whole number of optimizer steps, or",
        ),
        ("optimizer: adamm", "mine.yaml: optimizer: got 'adamm', expected 'sgd', 'adam' or 'adamw'"),
        (
            "tuning: {arm: cosine, lrs: [0.1], n_seeds: 1}",
            "mine.yaml: tuning.lrs: got [0.1], expected at least 2 entries",
        ),
        (
            "tuning: {arm: cosine, lr: [0.1, 1], n_seeds: 1}",
            "unknown key in tuning of mine.yaml 'lr'; did you",
        ),
        (
            "tuning: {arm: q_learning, lrs: [0.1, 1], n_seeds: 1}",
            "tuning.arm: got 'q_learning', expected a baseline",
        ),
        (
            "tuning: {arm: cosine, lrs: [0.1, 0.1], n_seeds: 1}",
            "mine.yaml: tuning.lrs: a rate is there twice",
        ),
        ("benchmark_tasks: [digits-mlp]", "mine.yaml: the task 'digits-mlp' is there twice"),
        ("optional_tasks: [text9-gpt]", "unknown task 'text9-gpt'; did you mean 'text8-gpt'?"),
        ("reward: loss", "unknown reward 'loss'; known: accuracy_improvement, "),
        ("device: gpu", "mine.yaml: device: got 'gpu', expected a text like ^(auto|cpu|cuda"),
        ("scales: {tiny: {}}", "unknown scale in mine.yaml 'tiny'; "),
        (
            "scales: {smoke: {seeds: 2}}",
            "unknown key in scales.smoke of mine.yaml 'seeds'; did you mean 'seed'?",
        ),
        ("scales: {smoke: {study: other}}", "unknown key in scales.smoke of mine.yaml 'study'"),
        (
            "user_config: {when: 2026-11-21}",
            "mine.yaml: user_config: got datetime.date(2026, 11, 21), expected",
        ),
        ("7: 8", "mine.yaml: a key is a name, got 7"),
        (
            "study: again",
            "mine.yaml is not valid YAML: the key 'study' is there twice (the second time in line 6)",
        ),
        ("user_config: &a {x: *a}", "is not valid YAML: aliases (*a) are not used in our files"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path, change, text):
    with pytest.raises(InputError) as caught:
        load_study(write(tmp_path, GOOD + change + "\n"))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arms", "text"),
    [
        ("[]", "mine.yaml: arms: got [], expected at least 1 entries"),
        ("[q_lerning]", "unknown arm 'q_lerning'; did you mean 'q_learning'?"),
        ("[yoked:q_lerning]", "unknown arm 'q_lerning'; did you mean 'q_learning'?"),
        ("[{id: a, agent: q_lerning}]", "unknown agent of arm 'a' 'q_lerning'; did you mean 'q_learning'?"),
        (
            "[{id: a, agent: q_learning, base: cosin}]",
            "unknown base of arm 'a' 'cosin'; did you mean 'cosine'?",
        ),
        ("[{id: a, agent: q_learning, rate: 1}]", "unknown key in arms.0 of mine.yaml 'rate'; did you mean"),
        ("[{id: a, agent: q_learning, lr: 0}]", "mine.yaml: arms.0.lr: got 0, expected a number above 0"),
        ("[{id: ../a, agent: cosine}]", "mine.yaml: arms.0.id: got '../a', expected a text like"),
        ("[{agent: cosine}]", "mine.yaml: arms.0.id: is missing"),
        ("[5]", "mine.yaml: arms.0: got 5, expected a valid dictionary"),
        ("[cosine, cosine]", "mine.yaml: arms: 'cosine' is there twice"),
        (
            "[{id: cosine, base: step}]",
            "arm 'cosine': base is for arms that decide; a baseline is its own schedule",
        ),
        (
            "[{id: cosine, reward: improvement}]",
            "arm 'cosine': reward, learn_runs, learn_tasks and experience are for learned arms",
        ),
        (
            "[{id: cosine, knob_options: {lr: {high: 1}}}]",
            "arm 'cosine': knob_options are for learned arms; this is a baseline",
        ),
        (
            "[{id: a, agent: q_learning, knob_options: {lrr: {high: 1}}}]",
            "unknown knob in knob_options of arm 'a' 'lrr'; did you mean 'lr'",
        ),
        ("[{id: default-cosine, lr: 1}]", "arm 'default-cosine': lr: default-cosine brings its own rate"),
        ("[replay]", "arm 'replay': 'replay' needs decisions to replay; use yoked:ARM"),
        (
            "[ppo]",
            "arm 'ppo': agent 'ppo' knows what it was taught before, and learns nothing in a run; expected brain",
        ),
        ("[placebo:evolution]", "arm 'evolution': agent 'evolution' knows what it was taught before"),
        ("[{id: a, agent: dqn, learn_runs: 2}]", "expected brain: NAME or FOLDER"),
        ("[{id: a, agent: q_learning, preset: papers}]", "arm 'a': unknown preset 'papers'; did you mean 'paper'"),
        ("[{id: a, agent: tuner, preset: paper}]", "arm 'a': unknown agent with a preset 'paper' 'tuner'"),
        ("[{id: a, agent: ppo, brain: default, preset: paper}]", "arm 'a': brain is for learned arms"),
        (
            "[{id: a, agent: constant, own_optimizer: schedulefree}]",
            "unknown own_optimizer of arm 'a' 'schedulefree'; did you mean 'schedule-free'",
        ),
        (
            "[{id: uwhg, own_optimizer: prodigy}]",
            "arm 'uwhg': own_optimizer is for a baseline, whose agent is the schedule over it, such as constant",
        ),
        (
            "[{id: default-cosine, own_optimizer: prodigy}]",
            "arm 'default-cosine': own_optimizer is for a baseline, whose agent is the schedule over it",
        ),
        ("[{id: a, agent: cosine, own_optimizer: prodigy, lr: 1}]", "arm 'a': lr: prodigy finds its own rate"),
        ("[placebo:yoked:uwhg]", "mine.yaml: arms.0.id: got 'placebo:yoked:uwhg', expected a text"),
        (
            "[uwhg, {id: 'yoked:uwhg', lr: 1}]",
            "arm 'yoked:uwhg': lr: a yoked arm takes its settings from 'uwhg'",
        ),
    ],
)
def test_a_wrong_arm_is_named(tmp_path, arms, text):
    with pytest.raises(InputError) as caught:
        load_study(write(tmp_path, GOOD.replace("[constant, q_learning]", arms)))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty; expected at least study, idea, tasks and arms"),
        (b"# only words\n", "is empty"),
        (b"[1, 2]", "holds a list, expected a mapping of keys"),
        (b"just words", "holds a str, expected a mapping"),
        (GOOD.encode()[:-9], "is not valid YAML"),
        (b"\xff\xfe\x00study", "is not UTF-8 text (byte 0)"),
        (b"study: \x00", "is not valid YAML"),
        (b"? [a]\n: 1\n", "is not valid YAML: "),
        (b"a: !!python/object/apply:os.system [ls]", "is not valid YAML: could not determine a constructor"),
        (b"[" * 5000, "is not valid YAML"),
        (b"study: mine\n", "idea: is missing; every study needs study, idea, tasks and arms"),
    ],
)
def test_a_file_that_is_no_study(tmp_path, content, text):
    with pytest.raises(InputError) as caught:
        load_study(write(tmp_path, content))
    assert text in str(caught.value)
    assert "mine.yaml" in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(str.encode),
        st.from_regex(r"(study|!!\w+|- |\{|&a|\*a|: |\n|\[|[a-z0-9.])*", fullmatch=True).map(str.encode),
    )
)
def test_random_files_are_one_error_of_ours(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("random") / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_study(path)


def test_our_studies_are_good_at_every_scale():
    assert sorted(study_names()) == [
        "adaptive-tuning",
        "cnn-intervention",
        "demo",
        "experience",
        "lr-scheduler",
        "pruning",
        "transformer-lr",
    ]
    for name, path in study_names().items():
        if name == "pruning":  # of another kind: test_pruning_study.py
            continue
        for scale in ("smoke", "small", "full"):
            assert parse_study(read_yaml(path), path.name, scale).study == name
            load_study(name, scale=scale)


def test_every_promised_arm_of_lr_scheduler_is_there():
    study = load_study("lr-scheduler")
    rates = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    assert study.sensitivity_lrs == study.tuning.lrs == rates
    assert study.n_seeds == study.sensitivity_seeds == 5
    learned = ["q_learning", "dqn", "q_learning-paper", "dqn-paper", "dqn-paper-continuous", "default-brain"]
    ids = {arm.id for arm in study.arms}
    assert {f"yoked:{name}" for name in [*learned, "fine-tuned-brain"]} <= ids
    assert {"constant", "step", "exponential", "cosine", "wsd", "plateau", "default-cosine"} <= ids
    assert {"schedule-free", "prodigy", "uwhg"} <= ids
    full = {arm.id: arm for arm in load_study("lr-scheduler", scale="full").arms}
    assert set(full) == ids
    for name in ("q_learning-paper", "dqn-paper", "dqn-paper-continuous"):
        options = full[name].options
        assert (options["gamma"], options["learning_rate"], options["epsilon"]) == (0.99, 1e-4, 0.1)
        assert options["every"] == "epoch"
    assert study.seeds_on("cifar10-vgg16") == 3
    few = ["constant", "cosine", "uwhg", "default-brain", "placebo:default-brain"]
    assert [arm.id for arm in study.arms_on("cifar10-vgg16")] == few


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("restricted: {digits: {arms: [constant], n_seeds: 1}}\n", "unknown task in restricted of mine.yaml 'digits'"),
        (
            "restricted: {digits-mlp: {arms: [constnt], n_seeds: 1}}\n",
            "unknown arm in restricted.digits-mlp of mine.yaml 'constnt'; did you mean 'constant'",
        ),
        ("restricted: {digits-mlp: {arms: [constant]}}\n", "restricted.digits-mlp.n_seeds"),
        ("total_steps: {digits: 5}\n", "unknown task in total_steps of mine.yaml 'digits'"),
        ("total_steps: {digits-mlp: 0}\n", "total_steps"),
        ("sensitivity_controls: 1\n", "sensitivity_controls: got 1"),
    ],
)
def test_wrong_restrictions_are_named(tmp_path, more, text):
    with pytest.raises(InputError) as caught:
        load_study(write(tmp_path, GOOD + more))
    assert text in str(caught.value)


def test_fewer_seeds_are_fewer_on_restricted_tasks_too(tmp_path):
    path = write(tmp_path, GOOD + "restricted: {digits-mlp: {arms: [constant], n_seeds: 3}}\n")
    assert load_study(path, n_seeds=2).seeds_on("digits-mlp") == 2
    assert load_study(path, n_seeds=9).seeds_on("digits-mlp") == 3


def test_arms_that_leave_a_restricted_task_without_any_are_refused(tmp_path):
    path = write(tmp_path, GOOD + "restricted: {digits-mlp: {arms: [constant], n_seeds: 3}}\n")
    with pytest.raises(InputError, match=r"digits-mlp is restricted to constant in mine.yaml, and none of them is ask"):
        load_study(path, arms=["q_learning"])


def test_the_demo_is_what_was_promised():
    study = load_study("demo")
    assert study.tasks == ("digits-mlp",)
    assert study.n_seeds == 5
    assert [arm.id for arm in study.arms] == [
        "constant",
        "step",
        "exponential",
        "cosine",
        "default-cosine",
        "uwhg",
        "q_learning",
        "placebo:q_learning",
        "yoked:q_learning",
    ]
    assert study.tuning.arm.id == "tuned-cosine"
    assert study.optional_tasks == ()


def test_the_transformer_study_is_what_was_promised():
    study = load_study("transformer-lr")
    arms = {arm.id: arm for arm in study.arms}
    assert study.optional_tasks == ("enwik8-gpt", "text8-gpt")
    assert arms["run_0"].lr == {"shakespeare-gpt": 1e-3, "enwik8-gpt": 5e-4, "text8-gpt": 5e-4}
    assert arms["run_1"].lr == arms["run_0"].lr
    for run in ("run_2", "run_3", "run_4", "cosine_2x"):
        assert arms[run].lr == {"shakespeare-gpt": 2e-3, "enwik8-gpt": 1e-3, "text8-gpt": 1e-3}
    assert arms["run_3"].reward == "improvement"
    assert arms["run_2"].reward == "negative_loss"
    assert arms["run_4"].options["epsilon_schedule"] == "exponential"
    for k in range(1, 5):
        assert arms[f"run_{k}"].base == "cosine"
        assert arms[f"placebo:run_{k}"].of == arms[f"yoked:run_{k}"].of == f"run_{k}"
    assert study.final_info is True
    assert load_study("transformer-lr", scale="full").settings["device"] == "auto"


def test_names_of_studies(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown study 'demmo'; did you mean 'demo'"):
        load_study("demmo")
    with pytest.raises(
        InputError, match=r"there is no study file .*nowhere.yaml; give a YAML file, or one of: adaptive-tuning"
    ):
        load_study(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match=r"cannot read the study file .*: Is a directory"):
        read_yaml(tmp_path)
    with pytest.raises(UnknownNameError, match="unknown scale 'tiny'"):
        load_study("demo", scale="tiny")


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"tasks": ["digits"]}, "unknown task 'digits'; did you mean 'digits-"),
        ({"tasks": ["digits-mlp", "digits-mlp"]}, "tasks: 'digits-mlp' is there twice"),
        ({"tasks": []}, "tasks: got an empty name"),
        ({"arms": ["constant", " "]}, "arms: got an empty name"),
        ({"arms": ["placebo:tuned-cosine"]}, "the tuned arm is an open-loop schedule and has no placebo"),
        ({"n_seeds": 0}, "n_seeds: got 0, expected a whole number of at least 1"),
        ({"n_seeds": math.nan}, "n_seeds: got nan, expected a whole number"),
        ({"seed": -1}, "seed: got -1, expected a whole number of at least 0"),
    ],
)
def test_a_wrong_question_is_refused(asked, text):
    with pytest.raises(InputError) as caught:
        load_study("demo", **asked)
    assert text in str(caught.value)


def test_reading_a_study_imports_no_torch():
    code = (
        "import sys; from trimtab.experiments.design import load_study; load_study('demo');"
        "print([name for name in ('torch', 'numpy', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
