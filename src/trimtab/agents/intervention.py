"""InterventionGate: whether to act at all, learned from what followed when something was changed and when not.

Called by `agents.tuner`. Its output is the probability that acting now beats leaving things as they are by at least
`min_gain`, and it acts where that lies above a threshold, which moves within bounds as interventions pay or do not.

Two differences are learned, each by every member of an ensemble (s: signals, g: 1 if something was changed, else 0; r:
reward in standard deviations around its mean, extremes clipped; V: the member's own m + v, of a copy that is renewed):

    r                 ~  m(s) + (g - 1/2) a(s)         what acting changes in the reward that follows at once
    gamma V(s') - c   ~  v(s) + (g - 1/2) b(s)         and in all that comes after it; c is the batch's mean

    A(s) = a(s) + k b(s),   k = mean(b)^2 / (mean(b)^2 + var(b))       over members
    p(s) = Phi((mean(A) - min_gain) / std(A)),         over members too

Members differ by their first weights, by a fixed random function that is added to their a, and by how often each
transition counts (Poisson(1)), so that they disagree where little was seen. Sources: bootstrapped ensembles with random
priors (Osband et al. 2018, arXiv:1806.03335); state value and advantage apart (Wang et al. 2016, arXiv:1511.06581).
That the later difference is shrunk by k is ours: what comes after is noise where it does not depend on the act.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.agents.base import Array, load_generator
from trimtab.errors import InputError
from trimtab.seeding import numpy_generator, torch_generator

__all__ = ["REACH", "Batch", "InterventionGate", "normal_cdf"]

MEMBERS, HIDDEN = 10, 32
RATE, DECAY = 3e-3, 1e-2  # of AdamW
PRIOR = 0.5  # size of the random functions, in standard deviations of the reward
RENEW_EVERY = 40  # minibatches between two copies of the networks that V is taken from
BOUND = 5.0  # normalised signals are clipped to +- this
EARLY = 100  # decisions after which half of what was drawn at random at first still is
REACH = 1.0  # how far the logit of the threshold may move from where it began
STEP = 0.05  # and how far one intervention moves it
SURE = 0.02  # probabilities this near to 0 or 1 are explored no more than at last, once EARLY decisions were taken
FENCE = 5.0  # numbers further than so many times the range of the middle 90 % beyond it are taken to be there
NEWEST = 2000  # rewards that their mean and standard deviation are of
_TABLE = 4096  # transitions after which the counts of the bootstrap repeat


class Batch(NamedTuple):
    """Transitions, as arrays with one leading axis (N,).

    Attributes:
        observations: Signals; (N, S).
        actions: What was proposed; (N, K).
        rewards: (N,).
        next_observations: (N, S).
        terminated: Whether no value follows; (N,), bool.
        intervened: Whether the action was written; (N,), bool.
        log_probs: Of the action when it was proposed; (N,).
        numbers: Of the transition, counted over all that the learner has seen; (N,), int64.
    """

    observations: Array
    actions: Array
    rewards: Array
    next_observations: Array
    terminated: npt.NDArray[np.bool_]
    intervened: npt.NDArray[np.bool_]
    log_probs: Array
    numbers: npt.NDArray[np.int64]


class InterventionGate:
    """See the head of this file.

    Args:
        n_signals: S.
        threshold: At first; 0 always acts, 1 never, and neither moves or explores. Else its logit may move by up to
            `REACH`: 0.4 stays within 0.197 and 0.644.
        gamma: Discount per decision.
        min_gain: What acting must win to be worth it, in standard deviations of the reward.
        exploration: Least share of decisions at which a coin decides instead; n decisions in, max(this, 1 / (1 + n /
            100)), and from the hundredth on no more than this where the probability is below 0.02 or above 0.98.
            Without it nothing would be learned of what is never tried. 0 turns it off.
        stagnation: Decisions without a new best running mean of the reward after which the threshold falls.
        seed: Of first weights, exploration and minibatches.

    Attributes:
        n_decisions: Decisions that it has taken in, over all runs.
        n_stagnations: How often the running mean had no new best for `stagnation` decisions; they are counted anew
            from there.
    """

    def __init__(
        self,
        n_signals: int,
        *,
        threshold: float = 0.4,
        gamma: float = 0.99,
        min_gain: float = 0.25,
        exploration: float = 0.02,
        stagnation: int = 20,
        seed: int = 0,
    ) -> None:
        self._first_threshold, self._gamma, self._min_gain = threshold, gamma, min_gain
        self._exploration, self._stagnation = exploration, stagnation
        generator = torch_generator(seed, "gate")
        self._weights = _first_weights(n_signals, 4, 0.1, generator)
        self._prior = [tensor.detach() for tensor in _first_weights(n_signals, 1, 1.0, generator)]
        self._prior[1] = 0.5 * torch.randn(self._prior[1].shape, generator=generator)
        self._optimizer = torch.optim.AdamW(self._weights, RATE, weight_decay=DECAY)
        self._seed = seed
        self._counts = _bootstrap(seed)
        self._rng = numpy_generator(seed, "gate")
        self._center, self._scale = np.zeros(n_signals), np.ones(n_signals)
        self._later_mean = 0.0  # c of the last minibatches
        self._shift = 0.0  # of the threshold's logit
        self._rewards = np.zeros(0)  # the newest
        self._moments = (0.0, 1.0)  # their mean and standard deviation, extremes clipped
        self._limits = (-math.inf, math.inf)  # that rewards are clipped to
        self._recent = self._best_recent = 0.0
        self._since_best = 0
        self.n_decisions = self.n_stagnations = 0

    def reseed(self, seed: int) -> None:
        """Begin exploration, and the drawing of minibatches, anew from a seed."""
        self._rng = numpy_generator(seed, "gate")

    # ---- deciding -----------------------------------------------------------------------------------------------

    @property
    def is_fixed(self) -> bool:
        """Whether it always or never acts, whatever it learns."""
        return self._first_threshold in (0.0, 1.0)

    @property
    def is_closed(self) -> bool:
        """Whether it never acts."""
        return self._first_threshold == 1.0

    @property
    def threshold(self) -> float:
        """What the probability has to lie above now."""
        if self.is_fixed:
            return self._first_threshold
        odds = self._first_threshold / (1 - self._first_threshold) * math.exp(self._shift)
        return odds / (1 + odds)

    @property
    def exploration(self) -> float:
        """Share of decisions at which a coin decides now."""
        is_off = self.is_fixed or self._exploration == 0
        return 0.0 if is_off else max(self._exploration, 1 / (1 + self.n_decisions / EARLY))

    @property
    def reward_mean(self) -> float:
        """Mean of the newest 2000 rewards, extremes clipped."""
        return self._moments[0]

    @property
    def reward_std(self) -> float:
        """Their standard deviation; 1 before there are two different ones."""
        return self._moments[1]

    @property
    def recent_reward(self) -> float:
        """Mean of the rewards, each decision's weight a tenth less than that of the next."""
        return float(self._recent)

    def normalize(self, observation: Array) -> Tensor:
        """Signals as the networks see them, (R, S): in standard deviations of what was seen."""
        x = (np.asarray(observation, dtype=np.float64) - self._center) / self._scale
        return torch.from_numpy(np.clip(x, -BOUND, BOUND)).to(torch.float32)

    def probability(self, observation: Array) -> Array:
        """p(s), above 0 and below 1; (R, S) -> (R,)."""
        with torch.no_grad():
            _, at_once, _, later = self._heads(self.normalize(observation), self._weights)
        a, b = at_once.double().numpy(), later.double().numpy()
        mean = b.mean(0)
        gains = a + mean**2 / (mean**2 + b.var(0) + 1e-12) * b
        z = (gains.mean(0) - self._min_gain) / (gains.std(0) + 1e-6)
        return np.clip([normal_cdf(number) for number in z], 1e-9, 1 - 1e-9)

    def decide(self, observation: Array, *, deterministic: bool) -> tuple[npt.NDArray[np.bool_], Array]:
        """Whether to act, and p; (R, S) -> (R,), (R,)."""
        p = self.probability(observation)
        acts = p > self.threshold
        if not deterministic and not self.is_fixed:
            is_sure = (np.abs(p - 0.5) > 0.5 - SURE) & (self.n_decisions >= EARLY)
            is_drawn = self._rng.random(len(p)) < np.where(is_sure, self._exploration, self.exploration)
            acts = np.where(is_drawn, self._rng.random(len(p)) < 0.5, acts)
        return acts, p

    # ---- learning -----------------------------------------------------------------------------------------------

    def take_in(self, batch: Batch) -> None:
        """Note the outcome of decisions: the reward's statistics, and the threshold.

        An intervention is a success where the reward and the value of what came after lie at least `min_gain` above
        what leaving things alone would have been worth. A failure raises the logit of the threshold by `STEP`, a
        success takes that back, step by step, and a stagnation lowers it by two: then more has to be tried.
        """
        is_success = self.advantages(batch, of_acting=False) > self._min_gain
        for reward, intervened, success in zip(batch.rewards, batch.intervened, is_success, strict=True):
            is_first = not len(self._rewards)
            self._count(np.array([reward]))
            reward = min(max(reward, self._limits[0]), self._limits[1])
            self._recent = reward if is_first else self._recent + 0.1 * (reward - self._recent)
            self._since_best += 1
            has_stagnated = self._since_best >= self._stagnation
            if is_first or has_stagnated or self._recent > self._best_recent:
                self._best_recent, self._since_best = self._recent, 0
            self.n_stagnations += has_stagnated
            if intervened:
                self._shift = self._shift + STEP if not success else min(self._shift, max(0.0, self._shift - STEP))
            if has_stagnated:
                self._shift -= 2 * STEP
            self._shift = min(max(self._shift, -REACH), REACH)

    def take_in_earlier(self, batch: Batch) -> None:
        """Note decisions of earlier runs: the reward's statistics, and that there is less to explore."""
        self._count(batch.rewards)
        self._recent = self._best_recent = self.reward_mean

    def _count(self, rewards: Array) -> None:
        """So many decisions more, and the mean and standard deviation of the newest rewards."""
        self._rewards = np.concatenate([self._rewards, rewards])[-NEWEST:]
        self._sum_up()
        self.n_decisions += len(rewards)

    def _sum_up(self) -> None:
        clipped = _fenced(self._rewards)
        if len(clipped):
            std = float(clipped.std())
            self._moments = (float(clipped.mean()), std if std > 0 else 1.0)
            self._limits = (float(clipped.min()), float(clipped.max()))

    def begin(self, observations: Array) -> None:
        """Take the first signals ever seen for the mean, until there is one; (N, S)."""
        finite = np.where(np.isfinite(observations), observations, 0.0)
        self._center = finite.mean(0)

    def fill(self, observation: Array) -> Array:
        """The same, with the mean of what was seen in place of numbers that are not finite; (R, S)."""
        return np.where(np.isfinite(observation), observation, self._center)

    @property
    def performance(self) -> float:
        """How the newest rewards stand to all of them: 0.5 as ever, towards 1 better, towards 0 worse."""
        return normal_cdf((self._recent - self.reward_mean) / self.reward_std)

    def advantages(self, batch: Batch, *, of_acting: bool = True) -> Array:
        """What each transition gave beyond what was expected of acting, or of leaving things alone; (N,).

        In standard deviations of the reward: r + (gamma V(s') - c) - (m + v + side (a + b)), side = 1/2 or -1/2.
        """
        side = 0.5 if of_acting else -0.5
        with torch.no_grad():
            m, a, v, b = (part.mean(0) for part in self._heads(self.normalize(batch.observations), self._weights))
            m_next, _, v_next, _ = (
                part.mean(0) for part in self._heads(self.normalize(batch.next_observations), self._weights)
            )
        expected = (m + v + side * (a + b)).double().numpy()
        alive = 1.0 - batch.terminated
        later = self._gamma * alive * (m_next + v_next).double().numpy() - self._later_mean
        return np.asarray(self.scaled(batch.rewards) + later - expected, dtype=np.float64)

    def learn(self, batch: Batch, timesteps: int, batch_size: int) -> None:
        """Learn from transitions.

        Args:
            batch: All that are remembered.
            timesteps: Transitions to draw from them, in minibatches.
            batch_size: Of a minibatch.
        """
        seen = _fenced(batch.observations)
        std = seen.std(0)
        self._center, self._scale = seen.mean(0), np.where(std > 1e-6, std, 1.0)
        now, then = self.normalize(batch.observations), self.normalize(batch.next_observations)
        rewards = torch.from_numpy(self.scaled(batch.rewards)).float()
        alive = torch.from_numpy(1.0 - batch.terminated).float()
        side = torch.from_numpy(batch.intervened - 0.5).float()
        counts = torch.from_numpy(self._counts[batch.numbers % _TABLE]).float()
        target = self._weights
        for number in range(max(1, timesteps // batch_size)):
            if number % RENEW_EVERY == 0:
                target = [weights.detach().clone() for weights in self._weights]
            rows = torch.from_numpy(self._rng.integers(0, len(rewards), min(batch_size, len(rewards))))
            with torch.no_grad():
                m_next, _, v_next, _ = self._heads(then[rows], target)
                later = self._gamma * alive[rows] * (m_next + v_next)
                mean = later.mean(1, keepdim=True)
                self._later_mean += 0.1 * (float(mean.mean()) - self._later_mean)
            m, a, v, b = self._heads(now[rows], self._weights)
            errors = (rewards[rows] - m - side[rows] * a) ** 2 + (later - mean - v - side[rows] * b) ** 2
            loss = (counts[rows].T * errors).mean(1).sum()
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def scaled(self, rewards: Array) -> Array:
        """Rewards in standard deviations around their mean, extremes clipped; (N,)."""
        return np.asarray((np.clip(rewards, *self._limits) - self.reward_mean) / self.reward_std)

    def _heads(self, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """m, a, v and b of every member; (N, S) -> four of (members, N)."""
        m, a, v, b = _network(x, weights).unbind(2)
        return [m, a + PRIOR * _network(x, self._prior)[:, :, 0], v, b]

    # ---- keeping ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that experience changed, as tensors and JSON scalars."""
        state: dict[str, Any] = {}
        for name, tensors in (("weights", self._weights), ("prior", self._prior)):
            state |= {f"{name}{n}": tensor.detach().clone() for n, tensor in enumerate(tensors)}
        for n, weights in enumerate(self._weights):
            kept = self._optimizer.state.get(weights) or {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(weights),
                "exp_avg_sq": torch.zeros_like(weights),
            }
            state |= {f"adam{n}.{key}": value.detach().clone() for key, value in kept.items()}
        state["signals"] = torch.from_numpy(np.stack([self._center, self._scale]))
        state["rewards"] = torch.from_numpy(self._rewards.copy())
        state["seed"] = self._seed
        state["numbers"] = [getattr(self, key) for key in _NUMBERS]
        state["rng"] = self._rng.bit_generator.state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            InputError: It does not fit; nothing is changed.
        """
        mine = self.state_dict()
        if set(state) != set(mine):
            raise InputError(f"gate: the state has the keys {sorted(state)}; expected {sorted(mine)}")
        for key, value in mine.items():
            if key != "rewards" and isinstance(value, Tensor) and getattr(state[key], "shape", None) != value.shape:
                given = tuple(getattr(state[key], "shape", ()))
                raise InputError(f"gate: {key} has the shape {given}; expected {tuple(value.shape)}")
        numbers = state["numbers"]
        if len(numbers) != len(_NUMBERS) or not all(isinstance(number, (int, float)) for number in numbers):
            raise InputError(f"gate: the numbers are {numbers}; expected {len(_NUMBERS)} of them")
        load_generator(self._rng, state["rng"], "gate")
        with torch.no_grad():
            for name, tensors in (("weights", self._weights), ("prior", self._prior)):
                for n, tensor in enumerate(tensors):
                    tensor.copy_(state[f"{name}{n}"])
        for n, weights in enumerate(self._weights):
            kept = {key: state[f"adam{n}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
            self._optimizer.state[weights] = kept
        self._center, self._scale = (row.copy() for row in state["signals"].double().numpy())
        self._rewards = state["rewards"].double().numpy().copy()
        self._sum_up()
        self._seed = int(state["seed"])
        self._counts = _bootstrap(self._seed)
        for key, value in zip(_NUMBERS, state["numbers"], strict=True):
            setattr(self, key, value)


_NUMBERS = ("_later_mean", "_shift", "_recent", "_best_recent", "_since_best", "n_decisions", "n_stagnations")


def _bootstrap(seed: int) -> npt.NDArray[np.int64]:
    """How often each transition counts for each member; (4096, members)."""
    return numpy_generator(seed, "gate bootstrap").poisson(1.0, (_TABLE, MEMBERS))


def _fenced(numbers: Array) -> Array:
    """Columns without their extremes, which else would be all that a mean and a standard deviation speak of."""
    if not len(numbers):
        return numbers
    low, high = np.percentile(numbers, [5, 95], axis=0)
    reach = np.where(high > low, FENCE * (high - low), np.inf)
    return np.clip(numbers, low - reach, high + reach)


def _first_weights(n_signals: int, n_outputs: int, size: float, generator: torch.Generator) -> list[Tensor]:
    """Weights and biases of two layers of all members."""
    shapes = [(n_signals, HIDDEN, 1.0), (1, HIDDEN, 0.0), (HIDDEN, n_outputs, size), (1, n_outputs, 0.0)]
    made = []
    for n_in, n_out, scale in shapes:
        drawn = torch.randn(MEMBERS, n_in, n_out, generator=generator)
        made.append((drawn * scale / math.sqrt(n_in)).requires_grad_())
    return made


def _network(x: Tensor, weights: list[Tensor]) -> Tensor:
    """(N, S) -> (members, N, outputs)."""
    w0, b0, w1, b1 = weights
    return torch.baddbmm(b1, torch.tanh(torch.baddbmm(b0, x.expand(MEMBERS, -1, -1), w0)), w1)


def normal_cdf(z: float) -> float:
    """Distribution function of the standard normal."""
    return 0.5 * math.erfc(-z / math.sqrt(2))
