"""What to do about a record of no schema that is read: its error says it."""

import difflib
import re
import reprlib
from collections.abc import Collection, Sequence

from rm.data.key_names import DIALOGUES, PROMPTS, is_another

UNPAIRED = "it grades single replies (unpaired); give those of one prompt together, as prompt, responses and scores"
# Public schemas that hold something else, and what to do about it: their keys -> the remedy.
REFUSED: dict[tuple[str, ...], str] = {
    ("prompt", "completions", "labels"): "it grades steps of a reply (a process reward), which is not implemented",
    ("prompt", "completion", "label"): UNPAIRED,
    ("prompt", "response", "is_safe"): UNPAIRED,
    ("messages", "label"): UNPAIRED,
    ("kto_tag",): UNPAIRED,
    ("message_tree_id", "prompt"): "it is a tree of messages; give the replies of each prompt as prompt, responses and "
    "ranks",
    ("message_id", "parent_id", "text"): "it is one message of a tree; give the replies of each prompt as prompt, "
    "responses and ranks",
    ("segments",): "its parts with and without loss are not implemented; give a prompt and a completion",
    ("query", "sample0", "best"): "it holds token ids of GPT-2; give texts",
    ("orig_instruction", "orig_response", "orig_score"): "it grades single replies; give replies of one prompt "
    "together, as prompt, responses and scores",
    ("reward_model", "prompt"): "it has a prompt without a reply (for reinforcement learning)",
}
# Parts of the names that people give to the worse and to the better one of two replies
WORSE = re.compile("reject|bad|wors|dispref|lose|losing|negative|incorrect|wrong")
BETTER = re.compile("chosen|good|better|best|prefer|win|accept|positive|correct|right")


def remedy(record: dict) -> str | None:
    """What to do about a record of a public schema that is not implemented."""
    return next((remedy for keys, remedy in REFUSED.items() if record.keys() >= set(keys)), None)


def explain(record: dict, script: str, candidates: Sequence, known: Collection[str]) -> str:
    """The error about a record that no schema of a script fits.

    Args:
        candidates: schemas of other scripts that fit it.
        known: the keys of all schemas.
    """
    listed = ", ".join(reprlib.repr(key) for key in list(record)[:12]) or "none with a value"
    if len(record) > 12:
        listed += f" and {len(record) - 12} more"
    if text := remedy(record):
        return f"has the keys {listed}: {text}"
    if candidates:
        regression = ", or for train_rm.py --loss regression" if "attributes" in record else ""
        return f"has the keys {listed}: it is a record of {candidates[0].name}, for {candidates[0].script}{regression}"
    names = ("prompt", "response") if script == "train_sft.py" else ("prompt", "chosen", "rejected")
    return (
        f"has the keys {listed}, which are no known schema (docs/data.md lists them, and what each becomes)"
        f"{_misspelled(record, known)}; if only the names differ, give them by --data_keys "
        f"{_pair_of_names(record, known) or ' '.join(f'{name}=KEY' for name in names)}"
    )


def _misspelled(record: dict, known: Collection[str]) -> str:
    """The keys of a record that are spelled nearly like a known one."""
    strange = [key for key in list(record)[:100] if key not in known]  # a record may have any number of keys
    absent = set(known) - record.keys()
    near = [(key, name) for key in strange for name in difflib.get_close_matches(_spelled(key), absent, 1, 0.8)]
    return f"; did you mean {', '.join(f'{name!r} by {key!r}' for key, name in near[:3])}?" if near else ""


def _pair_of_names(record: dict, known: Collection[str]) -> str | None:
    """What --data_keys would be for a record with two replies, if they can be told by their names."""
    strange = [key for key in list(record)[:100] if _spelled(key) not in known]
    prompt = "" if any(key in record for key in (*PROMPTS, *DIALOGUES)) else "prompt=KEY "
    worse = [key for key in strange if WORSE.search(key.lower())]
    better = [key for key in strange if key not in worse and BETTER.search(key.lower())]
    if len(better) == len(worse) == 1:
        return f"{prompt}chosen={better[0]} rejected={worse[0]}"
    replies = [key for key in list(record)[:100] if is_another(key, record.keys() - {key}) and key not in PROMPTS]
    return f"{prompt}response_a={replies[0]} response_b={replies[1]} winner=KEY" if len(replies) == 2 else None


def _spelled(key: str) -> str:
    return key.strip().lower().replace(" ", "_")
