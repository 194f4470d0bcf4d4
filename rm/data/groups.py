"""Examples that are computed together: those of one prompt, each distinct reply once (--group_by_prompt).

A step takes whole groups. One that has more tokens than a micro-batch may have is computed in several parts, so that
--max_tokens decides about memory, and not about what a step trains on. Without --group_by_prompt each example is a
group of one part.

Shapes: N examples, G groups, Q parts; of a part K distinct replies, of P tokens in common and R tokens each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rm.data.examples import Example, Examples, common_prefix


@dataclass(frozen=True)
class Part:
    """The texts of some examples of one prompt: a prefix, and the distinct replies that continue it."""

    prefix: np.ndarray  # (P,) int32
    replies: Sequence[np.ndarray]  # K arrays of int32
    compared: list[np.ndarray]  # of each example, which of the replies are its own, in its order
    loss: Sequence[np.ndarray] | None  # K arrays as long as the replies: the weight of each token in the SFT loss

    def num_tokens(self, share_prefix: bool) -> int:
        """In a micro-batch."""
        return sum(map(len, self.replies)) + len(self.prefix) * (1 if share_prefix else len(self.replies))

    def num_labels(self) -> int:
        """Tokens that carry SFT loss."""
        if self.loss is None:
            return 0
        first = 0 if len(self.prefix) else 1  # nothing predicts the first token of a text
        return sum(np.count_nonzero(loss[first:]) for loss in self.loss)


def part_of(examples: Examples, members: Sequence[int], label_chosen: bool = False) -> Part:
    """The part of examples with these indices.

    Args:
        label_chosen: chosen replies carry SFT loss.
    """
    own = [examples[int(i)] for i in members]
    if len(own) == 1:
        (example,) = own
        prefix, replies, compared = example.prefix, example.replies, [np.arange(len(example.replies))]
        if len(replies) == 1:  # a text for SFT
            return Part(prefix, replies, compared, example.loss)
    else:
        index_of: dict[bytes, int] = {}  # tokens of a full text -> its index among the distinct ones
        texts = [[np.concatenate([example.prefix, reply]) for reply in example.replies] for example in own]
        compared = [
            np.array([index_of.setdefault(text.tobytes(), len(index_of)) for text in of_example])
            for of_example in texts
        ]
        distinct = [np.frombuffer(text, np.int32) for text in index_of]
        prefix = distinct[0][: common_prefix(distinct)]
        replies = [text[len(prefix) :] for text in distinct]
    loss = _loss_of_chosen(own, len(prefix), replies, compared) if label_chosen else None
    return Part(prefix, replies, compared, loss)


def _loss_of_chosen(
    own: Sequence[Example], prefix_length: int, replies: Sequence[np.ndarray], compared: list[np.ndarray]
) -> list[np.ndarray]:
    """The weight of each token of the replies: of an example's best replies together its own weight, of others none.

    It begins where the replies of the example do: at the first token that they do not all share.
    """
    loss = [np.zeros(len(reply), np.float32) for reply in replies]
    for example, indices in zip(own, compared, strict=True):
        shared = len(example.prefix) - prefix_length
        best = _best(example)
        for i in indices[best]:
            loss[i][shared:] += example.weight / best.sum()
    return loss


def _best(example: Example) -> np.ndarray:
    """(K,) bool: which replies are the best; none where no reply is better than another."""
    grade = example.grade * np.sign(example.label - 0.5)
    best = grade == grade.max()
    return best & ~best.all()


@dataclass(frozen=True)
class Groups:
    """All examples of a training in groups, and these in parts."""

    members: np.ndarray  # (N,) indices of the examples, one part after the other
    part_starts: np.ndarray  # (Q + 1,) where in `members` each part begins, and the last one ends
    group_starts: np.ndarray  # (G + 1,) the first part of each group, and Q
    lengths: np.ndarray  # (Q,) tokens of each part in a micro-batch
    attention_pairs: np.ndarray  # (Q,) the number of (query, key) pairs in each part's attention
    labels: np.ndarray  # (Q,) tokens of each part that carry SFT loss
    replies: np.ndarray  # (Q,) of each part

    def __len__(self) -> int:
        return len(self.group_starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        """(G,) examples of each group."""
        return np.diff(self.part_starts[self.group_starts])

    def members_of(self, part: int) -> np.ndarray:
        """Indices of the examples of a part."""
        return self.members[self.part_starts[part] : self.part_starts[part + 1]]

    def parts_of(self, groups: np.ndarray) -> np.ndarray:
        """The parts of some groups, in their order."""
        counts = np.diff(self.group_starts)[groups]
        behind = np.cumsum(counts)
        return np.repeat(self.group_starts[groups] - behind + counts, counts) + np.arange(counts.sum())


def alone(examples: Examples, share_prefix: bool, label_chosen: bool = False) -> Groups:
    """Each example as a group of its own."""
    starts = np.arange(len(examples) + 1)
    return Groups(
        members=starts[:-1],
        part_starts=starts,
        group_starts=starts,
        lengths=packed_lengths(examples, share_prefix),
        attention_pairs=_attention_pairs(examples, share_prefix),
        labels=_chosen_counts(examples) if label_chosen else label_counts(examples),
        replies=np.diff(examples.reply_offsets),
    )


def by_prompt(examples: Examples, share_prefix: bool, max_tokens: int, label_chosen: bool = False) -> Groups:
    """The examples of each prompt as a group."""
    order = np.argsort(examples.prompt, kind="stable")
    (ends,) = np.nonzero(np.diff(examples.prompt[order]))
    parts, group_starts, several = [], [0], {}  # several: index of a part of several examples -> its sizes
    for members in np.split(order, ends + 1):
        for of_part, part in _split(examples, members, share_prefix, max_tokens, label_chosen):
            if part is not None:
                several[len(parts)] = _sizes(part, share_prefix)
            parts.append(of_part)
        group_starts.append(len(parts))
    each = alone(examples, share_prefix, label_chosen)
    first = np.array([of_part[0] for of_part in parts])
    sizes = np.stack([each.lengths, each.attention_pairs, each.labels, each.replies])[:, first]
    sizes[:, list(several)] = np.array(list(several.values())).reshape(-1, 4).T
    part_starts = np.cumsum([0, *map(len, parts)])
    return Groups(np.concatenate(parts), part_starts, np.array(group_starts), *sizes)


def _split(
    examples: Examples, members: np.ndarray, share_prefix: bool, max_tokens: int, label_chosen: bool
) -> Iterator[tuple[np.ndarray, Part | None]]:
    """The examples of a group in as many parts as a micro-batch's tokens need. None: a part of one example."""
    start = 0
    while start < len(members):
        end = len(members)
        part = None if end - start == 1 else part_of(examples, members[start:], label_chosen)
        if part is not None and part.num_tokens(share_prefix) > max_tokens:
            end, part = start + 1, None
            while end < len(members):
                larger = part_of(examples, members[start : end + 1], label_chosen)
                if larger.num_tokens(share_prefix) > max_tokens:
                    break
                end, part = end + 1, larger
        yield members[start:end], part
        start = end


def _sizes(part: Part, share_prefix: bool) -> tuple[int, int, int, int]:
    """What `Groups` holds of a part."""
    prefix, replies = len(part.prefix), np.array([len(reply) for reply in part.replies])
    copies = 1 if share_prefix else len(replies)
    pairs = _pairs_of_reply(replies, prefix).sum() + copies * prefix * (prefix + 1) // 2
    return part.num_tokens(share_prefix), int(pairs), part.num_labels(), len(replies)


def packed_lengths(examples: Examples, share_prefix: bool) -> np.ndarray:
    """(N,) tokens that each example takes in a micro-batch."""
    if share_prefix:
        return examples.lengths
    return examples.lengths + (np.diff(examples.reply_offsets) - 1) * examples.prefix_lengths


def _attention_pairs(examples: Examples, share_prefix: bool) -> np.ndarray:
    """(N,) the number of (query, key) pairs in each example's attention."""
    replies, prefix = examples.reply_lengths.astype(np.int64), examples.prefix_lengths.astype(np.int64)
    replies_per_example = np.diff(examples.reply_offsets)
    of_replies = _pairs_of_reply(replies, np.repeat(prefix, replies_per_example))
    copies = 1 if share_prefix else replies_per_example
    return np.add.reduceat(of_replies, examples.reply_offsets[:-1]) + copies * prefix * (prefix + 1) // 2


def _pairs_of_reply(reply: np.ndarray, prefix: np.ndarray | int) -> np.ndarray:
    """The pairs of a reply of R tokens behind a prompt of P: R (R + 1) / 2 within it, and R P with the prompt."""
    return reply * (reply + 1) // 2 + reply * prefix


def label_counts(examples: Examples) -> np.ndarray:
    """(N,) labelled tokens of each example; a text's first token has none that predicts it."""
    loss, first, last = examples.loss, examples.starts, examples.starts + examples.lengths - 1
    # reduceat sums from each index to the next. Of first, last, first, last, ... the even sums are over [first, last)
    # of one example, the odd ones over what lies between two examples.
    sums = np.add.reduceat(loss, np.stack([first, last], axis=1).ravel(), dtype=np.int64)
    before_last = sums[::2]
    return np.where(examples.lengths > 1, before_last + loss[last] - loss[first], 0)


def _chosen_counts(examples: Examples) -> np.ndarray:
    """(N,) tokens of the replies that are the best of their example, as `_best` has it."""
    starts, counts = examples.reply_offsets[:-1], np.diff(examples.reply_offsets)
    grade = examples.grade * np.repeat(np.sign(examples.label - 0.5), counts)
    best = grade == np.repeat(np.maximum.reduceat(grade, starts), counts)
    is_decided = (np.add.reduceat(best.astype(int), starts) < counts) & (examples.weight > 0)
    predicted = examples.reply_lengths - np.repeat(examples.prefix_lengths == 0, counts)
    return np.add.reduceat(predicted * best, starts) * is_decided
