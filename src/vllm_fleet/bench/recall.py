"""The recall task: prompts whose only right answer lies in the KV of the whole prompt.

A prompt lists facts and asks for one of them: ``amber=417 birch=023 cedar=551 ? birch=``. The demo model
(examples/recall) answers ``023 cedar=551 ?`` and stops: the value asked for, then the rest of the list. Every token of
the answer is copied from a place in the prompt, so one misplaced, stale or missing KV block makes it wrong. That makes
the task the oracle of the correctness tests, and it needs no reference model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_WORDS = """
    acorn agate alder alley almond amber anchor ankle anvil apple apron arch arrow ash aspen attic autumn axle badge
    bagel ballad bamboo banjo barge bark barley barn barrel basil basin basket bay beach beacon bean bear beaver bell
    bench berry birch bishop blade blanket bloom boat bolt bone bonnet book boot bottle boulder bow bowl branch brass
    bread brick bridge bronze brook broom brush bucket buckle bugle butter button cabin cable cactus cake camel candle
    canoe canvas canyon cape carbon carpet carrot castle cave cedar cellar chain chair chalk cherry chess chest chimney
    cider cinder circle citrus clay cliff cloak clock cloud clover coal coast cobalt cocoa coin comet compass copper
    coral cork corn cotton cove coyote crab crane crater cream creek crown crystal cup curtain cypress daisy dancer dawn
    deer delta desert dew diamond dingo dolphin domino donkey door dove dragon drum duck dune eagle earth easel echo
    eel elbow elder elk elm ember emerald engine falcon farm feather fern ferry fiddle field fig finch fir flag flame
    flask flint flock flour flute fog forest forge fossil fox frost fruit galaxy garden garlic garnet gate gecko geyser
    ginger glacier glass globe glove goat gold goose grain granite grape grass gravel grove guitar gull hammer harbor
    hare harp hat hawk hazel heather hedge helm hemp heron hill hinge holly honey hood hook horn horse house ice indigo
    ink iris iron island ivory ivy jacket jade jar jasmine jewel juniper kayak kettle key kite kiwi knot lace ladder
    lagoon lake lamp lance lantern larch lark laurel lava lawn leaf ledge lemon lens lentil lichen lilac lily lime linen
    lion lizard llama lobster locket loom lotus lupin lynx lyre magnet mango mantle maple marble marsh mast meadow melon
"""
WORDS: tuple[str, ...] = tuple(_WORDS.split())
"""Every key of a fact; each is one token of the demo model."""

_FACT_TOKENS = 6  # key, '=', three digits, ' '
_QUESTION_TOKENS = 4  # '?', ' ', key, '='


@dataclass(frozen=True)
class RecallPrompt:
    """One question with its only right answer."""

    text: str
    answer: str
    """What follows the prompt: the value asked for, and the facts after it, ending in ``' ?'``."""

    @property
    def value(self) -> str:
        """The three digits asked for."""
        return self.answer[:3]


def facts_for_tokens(tokens: int) -> int:
    """The number of facts whose prompt has at most ``tokens`` tokens (and at least one fact)."""
    return max(1, (tokens - _QUESTION_TOKENS) // _FACT_TOKENS)


def prompt_tokens(facts: int) -> int:
    """Tokens of a prompt with ``facts`` facts."""
    return facts * _FACT_TOKENS + _QUESTION_TOKENS


def make_prompt(rng: random.Random, facts: int, asked: int | None = None) -> RecallPrompt:
    """A random prompt with ``facts`` distinct facts that asks for the one at index ``asked`` (random when None).

    Raises:
        ValueError: when ``facts`` is not between 1 and ``len(WORDS)``, or ``asked`` not below ``facts``.
    """
    if not 1 <= facts <= len(WORDS):
        raise ValueError(f"facts must be between 1 and {len(WORDS)}, not {facts}")
    if asked is None:
        asked = rng.randrange(facts)
    if not 0 <= asked < facts:
        raise ValueError(f"asked must be between 0 and {facts - 1}, not {asked}")
    keys = rng.sample(WORDS, facts)
    pairs = [f"{key}={rng.randrange(1000):03d}" for key in keys]
    recited = " ".join([*pairs[asked:], "?"])
    return RecallPrompt(text=f"{' '.join(pairs)} ? {keys[asked]}=", answer=recited[len(keys[asked]) + 1 :])
