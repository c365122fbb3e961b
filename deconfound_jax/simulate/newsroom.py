"""The newsroom: headlines whose popularity confounds engagement, with the truth kept apart.

    W = .6 s + .8 e1         wording, good          s = N(0, 1) + .3 week   the mood of the newsroom
    C = .3 s + sqrt(.91) e2  curiosity, bad         u                       unseen, in popularity and engagement
    E = e3                   emotion, good          z                       instrument

    p = pi z + s + u + .3 e4
    y = f(x) + gamma p + kappa u + .5 article + .5 week + exclusion z + .5 e5

A headline is words, grammar: 4 to 12 topic words, then 0 to 3 curiosity tokens, then 0 to 3
emotion tokens. W, C and E become these counts by the quantiles of their own population, so each
count is uniform over its range and the map does not depend on the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from deconfound_jax.config import Newsroom
from deconfound_jax.structs import Logs, Roles

TOPICS = (
    "harbor ferry dock tide", "garden seed rose orchard", "school pupil lesson desk",
    "market stall trader coin", "river bridge barge mill", "forest oak trail fox",
    "hospital nurse ward clinic", "railway train platform ticket", "stadium goal coach match",
    "museum statue curator gallery", "kitchen recipe oven spice", "court judge jury verdict",
    "library novel author shelf", "airport pilot runway flight", "farm barn tractor harvest",
    "theater actor stage script", "mountain peak glacier climber", "council mayor budget vote",
    "factory worker engine shift", "castle tower knight moat", "island lagoon palm reef",
    "desert dune camel oasis", "weather storm cloud thunder", "planet comet orbit telescope",
    "bakery dough crust flour", "music violin choir concert", "cinema film director camera",
    "hotel lobby guest suite", "police patrol siren badge", "village well chapel lane",
    "beach sand surf dolphin", "winter snow sled frost", "science lab microscope atom",
    "fashion fabric tailor dress", "cycling pedal helmet saddle", "chess rook pawn board",
    "coffee bean mug roast", "bank loan vault ledger", "zoo tiger keeper penguin",
    "wine grape cellar cork",
)  # fmt: skip
CURIOSITY = "why how secret hidden unseen mystery riddle puzzle whisper guess clue reveal untold curious wonder".split()
EMOTION = "joy fury grief hope fear love pride shame awe rage delight sorrow thrill dread envy".split()
TOPIC_WORDS = frozenset(" ".join(TOPICS).split())
WEEK_IN_MOOD = 0.3  # a week's effect on s, so that the week confounds too


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A count the true reward sees: its range, its coefficient, its correlation with the base mood."""

    name: str
    low: int
    high: int
    coefficient: float
    loading: float

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    @property
    def sd(self) -> float:
        """Of a uniform count, which is what the quantile map makes of the population."""
        return (((self.high - self.low + 1) ** 2 - 1) / 12) ** 0.5

    def standardise(self, count: np.ndarray) -> np.ndarray:
        return (count - self.mean) / self.sd

    def count(self, latent_n: np.ndarray, latent_sd: float) -> np.ndarray:
        """Equal-probability bins of N(0, latent_sd^2) -> the counts low..high."""
        levels = self.high - self.low + 1
        edges = [NormalDist(0.0, latent_sd).inv_cdf(i / levels) for i in range(1, levels)]
        return self.low + np.searchsorted(np.asarray(edges), latent_n, side="right")


WORDS = Attribute("words", 4, 12, 0.6, 0.6)
CURIOUS = Attribute("curiosity", 0, 3, -0.3, 0.3)
EMOTIONAL = Attribute("emotion", 0, 3, 0.3, 0.0)
ATTRIBUTES = (WORDS, CURIOUS, EMOTIONAL)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a log never shows. Arrays are aligned with the rows of the log; columns of
    `attributes_nk` with `ATTRIBUTES`: counts of topic words, curiosity tokens, emotion tokens."""

    reward_n: np.ndarray  # f(x), in units of y
    attributes_nk: np.ndarray
    mood_n: np.ndarray  # s
    unseen_n: np.ndarray  # u
    article_effect_n: np.ndarray
    week_effect_n: np.ndarray
    config: Newsroom  # gamma, kappa, instrument and exclusion are the constants of the mechanism


def simulate(config: Newsroom, seed: int) -> tuple[Logs, Truth]:
    """A log of `articles * headlines` rows, and its truth.

    The same noise is drawn whatever the constants are, so logs of one seed differ by a constant's
    effect alone (`gamma`, `kappa`, `instrument` and `exclusion` leave every headline as it is).

    Args:
      config: sizes and constants.
      seed: of everything drawn.
    Returns:
      logs with columns headline, engagement (y), popularity (p), z, article and week; and the truth.
    Raises:
      ValueError: a size is below one, or there are more topics than the word list holds.

    >>> logs, truth = simulate(Newsroom(articles=2), seed=0)
    >>> len(logs), truth.attributes_nk.shape
    (10, (10, 3))
    """
    _check(config)
    rng = np.random.default_rng(seed)
    article_n = np.repeat(np.arange(config.articles), config.headlines)
    topic_n = rng.integers(config.topics, size=config.articles)[article_n]
    week_n = rng.integers(config.weeks, size=config.articles)[article_n]
    article_effect_n = rng.normal(size=config.articles)[article_n]
    week_effect_n = rng.normal(size=config.weeks)[week_n]
    base_n, u_n, z_n, noise_p_n, noise_y_n = rng.normal(size=(5, len(article_n)))
    s_n = base_n + WEEK_IN_MOOD * week_effect_n

    count_nk = _counts(s_n, rng.normal(size=(len(ATTRIBUTES), len(article_n))), config.entangled)
    reward_n = _reward(count_nk)
    p_n = config.instrument * z_n + s_n + u_n + 0.3 * noise_p_n
    effects_n = config.gamma * p_n + config.kappa * u_n + 0.5 * article_effect_n + 0.5 * week_effect_n
    y_n = reward_n + effects_n + config.exclusion * z_n + 0.5 * noise_y_n
    columns = {
        "headline": np.asarray(_write(topic_n, count_nk, rng), object),
        "engagement": y_n,
        "popularity": p_n,
        "z": z_n,
        "article": np.asarray([f"article{a:04d}" for a in article_n], object),
        "week": np.asarray([f"week{w:02d}" for w in week_n], object),
    }
    truth = Truth(reward_n, count_nk, s_n, u_n, article_effect_n, week_effect_n, config)
    return Logs.of(columns, _ROLES), truth


def vocabulary(config: Newsroom) -> list[str]:
    """Every word a headline of this newsroom may hold: 4 a topic, 15 curiosity, 15 emotion.

    At 40 topics 190 words, which with 4 special ids stay within a vocabulary of 200.
    """
    _check(config)
    return " ".join(TOPICS[: config.topics]).split() + CURIOSITY + EMOTION


def parse(text: str) -> tuple[int, int, int] | None:
    """Counts (topic words, curiosity, emotion) of a text on the grammar, else None.

    Off the grammar: an unknown word, a class out of order, a count outside its range. Words of
    several topics are on it: a policy is not told an article.

    >>> parse("harbor ferry dock tide why joy joy")
    (4, 1, 2)
    >>> parse("harbor ferry dock tide joy why") is None
    True
    """
    classes = [_CLASS.get(word) for word in text.split()]
    if None in classes or classes != sorted(classes):
        return None
    words, curiosity, emotion = (classes.count(k) for k in range(len(ATTRIBUTES)))
    inside = all(a.low <= c <= a.high for a, c in zip(ATTRIBUTES, (words, curiosity, emotion), strict=True))
    return (words, curiosity, emotion) if inside else None


def true_reward(texts: Sequence[str]) -> np.ndarray:
    """f(x) (n,) of any texts, in units of y.

        f = .6 W~ - .3 C~ + .3 E~,   ~ = count standardised by its population mean and sd

    A text off the grammar scores `grammar_minimum()`.
    """
    parsed = [parse(text) for text in texts]
    count_nk = np.asarray([p or _WORST for p in parsed], np.int64).reshape(len(parsed), len(ATTRIBUTES))
    return _reward(count_nk)


def grammar_minimum() -> float:
    """The least f of a text on the grammar: fewest topic words, most curiosity, no emotion."""
    return float(_reward(np.asarray([_WORST]))[0])


def _reward(count_nk: np.ndarray) -> np.ndarray:
    return sum(a.coefficient * a.standardise(count_nk[:, k]) for k, a in enumerate(ATTRIBUTES))


def _counts(s_n: np.ndarray, noise_kn: np.ndarray, entangled: bool) -> np.ndarray:
    """Counts (n, 3). Not entangled: no attribute moves with the mood."""
    columns = []
    for attribute, noise_n in zip(ATTRIBUTES, noise_kn, strict=True):
        loading = attribute.loading if entangled else 0.0
        latent_n = loading * s_n + (1 - loading**2) ** 0.5 * noise_n
        columns.append(attribute.count(latent_n, (1 + (loading * WEEK_IN_MOOD) ** 2) ** 0.5))
    return np.stack(columns, axis=1)


def _write(topic_n: np.ndarray, count_nk: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Headlines with these counts; words of a class are drawn with replacement."""
    topics = [topic.split() for topic in TOPICS]
    pool_sizes = (len(topics[0]), len(CURIOSITY), len(EMOTION))
    # As many picks as a class may have tokens, so that one row's counts never move another row's words.
    picks = [rng.integers(m, size=(len(topic_n), a.high)) for m, a in zip(pool_sizes, ATTRIBUTES, strict=True)]
    texts = []
    for row, topic in enumerate(topic_n):
        words = []
        for pool, pick_nj, count in zip((topics[topic], CURIOSITY, EMOTION), picks, count_nk[row], strict=True):
            words += [pool[j] for j in pick_nj[row, :count]]
        texts.append(" ".join(words))
    return texts


def _check(config: Newsroom) -> None:
    for name in ("articles", "headlines", "weeks", "topics"):
        if getattr(config, name) < 1:
            raise ValueError(f"Newsroom.{name}: expected at least 1, got {getattr(config, name)}")
    if config.topics > len(TOPICS):
        raise ValueError(f"Newsroom.topics: expected at most {len(TOPICS)} (the word list's), got {config.topics}")


_CLASS = {word: k for k, words in enumerate((TOPIC_WORDS, CURIOSITY, EMOTION)) for word in words}
_WORST = tuple(a.high if a.coefficient < 0 else a.low for a in ATTRIBUTES)
_ROLES = Roles(
    text="headline",
    outcome="engagement",
    confounders=("popularity", "week", "article"),
    instruments=("z",),
    group="article",
    pair_within="article",
)
