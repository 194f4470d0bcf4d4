"""What metrics need to know of a record besides its tokens."""

from dataclasses import dataclass

from rm.data.reader import Located


@dataclass(frozen=True)
class RecordInfo:
    """One record, as `Result.record_info` has it."""

    id: str | int  # the record's `id` if it has one, else its number in the set, from 1
    subset: str  # "" if the record names none
    turns: int  # number of user messages
    lengths: list[int]  # characters of each reply's last message
    schema: str = ""  # its name in `rm.data.schemas`
    file: str = ""  # that it is in
    compared: tuple[tuple[int, int], ...] | None = None  # see `rm.data.sample.Sample`


def record_info(located: Located, file: str) -> RecordInfo:
    sample, dialogues = located.sample, located.sample.dialogues()
    return RecordInfo(
        id=located.number + 1 if sample.id is None else sample.id,
        subset=sample.subset,
        turns=sum(message["role"] == "user" for message in dialogues[0]),
        lengths=[len(dialogue[-1]["content"]) for dialogue in dialogues],
        schema=sample.schema,
        file=file,
        compared=sample.compared,
    )
