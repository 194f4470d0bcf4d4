"""A record in canonical form, whatever schema it had (`rm.data.schemas`)."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rm.data.messages import Message, Text, assistant, prompt_messages, split_turns, turn_marker


class Bare(NamedTuple):
    """A prompt and a reply that are both strings: joined as they stand, or made a dialogue."""

    prompt: str
    reply: str

    def joined(self) -> str:
        return self.prompt + self.reply

    def dialogue(self) -> list[Message]:
        """The turns that are marked in the prompt, or one user turn, and the reply."""
        # A prompt with marks ends in "Assistant:", whose one space is part of the mark.
        reply = self.reply.removeprefix(" ") if turn_marker(self.prompt) else self.reply
        return [*prompt_messages(self.prompt), assistant(reply)]


@dataclass(frozen=True)
class Sample:
    """One text for SFT, or K full texts of one prompt to score or to compare.

    `grade` is None where the record does not say which texts are better.
    """

    schema: str  # its name in `rm.data.schemas.SCHEMAS`
    texts: list[Text | Bare]  # of a pair the chosen one first, rankings in the record's order
    grade: list[float] | None = None  # K numbers: higher is better, equal is a tie
    label: float = 1.0  # probability that the grades of a pair are right
    margin: float = 0.0  # by how much the better reward should exceed the other
    weight: float = 1.0  # factor of the loss
    strength: float = 1.0  # how much better the better text is, where the record says so: HelpSteer's 0 to 3
    attributes: tuple[float, ...] = ()  # the numbers that --attributes names, nan where the record has none
    tools: list[dict] | None = None  # for the chat template
    template_kwargs: dict = field(default_factory=dict)  # more variables for the chat template
    without_loss: frozenset[int] = frozenset()  # positions of the messages of a demonstration that carry no loss
    joined_by_default: bool = False  # bare strings are a dialogue only if a setting says so (LMFlow's text2text)
    lacks_prompt: bool = False  # it has the key of a prompt, but nothing there, and replies that answer nothing
    joined_by: str | None = None  # consecutive samples with the same one are the replies of one prompt
    compared: tuple[tuple[int, int], ...] | None = None  # indices of the texts that a benchmark compares; None: all
    id: str | int | None = None
    subset: str = ""

    @property
    def is_bare(self) -> bool:
        return any(isinstance(text, Bare) for text in self.texts)

    def written(self, bare_as_dialogue: bool = False, as_messages: bool = False) -> list[Text]:
        """The full texts.

        Args:
            bare_as_dialogue: make bare strings a dialogue. Otherwise they are joined as they stand.
            as_messages: split plain full texts into turns. Otherwise they stay strings.
        """
        texts: list[Text] = []
        for text in self.texts:
            if isinstance(text, Bare):
                text = text.dialogue() if bare_as_dialogue else text.joined()
            elif as_messages and isinstance(text, str):
                text = split_turns(text)
            texts.append(text)
        return texts

    def dialogues(self) -> list[list[Message]]:
        """The full texts turn by turn, for code that compares records."""
        return [turns(text) for text in self.written(bare_as_dialogue=True)]

    @property
    def loss_from(self) -> int:
        """Of a text for SFT that is joined: the number of leading characters that carry no loss."""
        return len(self.texts[0].prompt) if isinstance(self.texts[0], Bare) else 0

    @property
    def signed_grade(self) -> np.ndarray:
        """(K,) higher is better. Below a label of 0.5 the order of the grades is wrong, at 0.5 the texts are tied."""
        if self.grade is None:
            raise ValueError("has responses without 'ranks' or 'scores', so nothing says which of them is better")
        return np.array(self.grade) * np.sign(self.label - 0.5)

    @property
    def is_tied(self) -> bool:
        """Whether no text is better than another."""
        grade = self.signed_grade
        return bool(grade.max() == grade.min())

    def best_and_worst(self) -> tuple[list[Message], list[Message]]:
        """The dialogues of the best and the worst text; of equally good ones the first and the last."""
        grade, dialogues = self.signed_grade, self.dialogues()
        # argsort is stable: ties stay in the record's order.
        order = np.argsort(-grade, kind="stable")
        return dialogues[order[0]], dialogues[order[-1]]


def turns(text: Text) -> list[Message]:
    """The messages of a text.

    A plain text is split at its marks (`rm.data.messages.TURN_MARKERS`); without any it is one assistant message.
    """
    if not isinstance(text, str):
        return text
    return split_turns(text) if turn_marker(text) else [assistant(text)]
