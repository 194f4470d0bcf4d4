"""Encodes texts held in memory the way training encoded the texts of files (`rm.data.encode`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from rm.data.chat import ChatTemplate, Rendered
from rm.data.encode import Encoder, PendingRecord, Task
from rm.data.examples import Examples
from rm.data.messages import Text
from rm.data.sample import Sample
from rm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts held in memory the way training encoded the texts of files."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_length: int
    cut: str | None  # "left" or "right" truncates longer texts on that side; None makes them an error
    bare_as_dialogue: bool = False  # whether a prompt and a reply that are bare strings become a dialogue
    padding_id: int | None = None  # as for `Encoder`
    parse_special_tokens: bool = False  # as for `Encoder`

    @property
    def as_messages(self) -> bool:
        """Whether plain texts are split into turns and written by the template."""
        return self.template is not None and self.template.explicit

    def examples(self, groups: Sequence[Sequence[Text | Rendered]]) -> Examples:
        """One example for each group that is not empty: its texts, whose common prefix is computed once.

        Raises:
            ValueError: a group would have been dropped in training.
        """
        encoder = Encoder(
            self.tokenizer, Task.SCORING, self.template, self.max_length, self.cut, self.padding_id,
            self.parse_special_tokens,
        )  # fmt: skip
        records = []
        for index, group in enumerate(groups):
            if len(group):
                sample = Sample("", list(group))
                records.append(PendingRecord(index, f"conversation {index}", index, sample, list(group)))
        examples = Examples.build(encoder.encode(records), encoder.kept)
        lost = {record.index for record in records} - set(encoder.kept)
        if lost:
            reasons = " or ".join(encoder.dropped).replace("--max_length", "max_length")
            raise ValueError(
                f"conversation {min(lost)} cannot be encoded ({reasons}): shorten it, or give another max_length"
            )
        return examples
