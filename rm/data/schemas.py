"""Which schema a record has, and what it becomes: a table of the public ones, in SCHEMAS.

A schema is recognized by the keys that a record has. The rows stand in the order in which they are tried, the more
specific ones first. What no schema reads is never dropped silently: a key that carries text or meaning is an error,
unless its text stands in the sample already; any other key is passed over, and counted.

A record's prompt, system message, history and tools are read in the same way for all schemas (`Fields.prompt`), under
every name that public data sets have for them. `docs/data.md` shows each schema. The functions raise ValueError without
naming the record, which only the caller knows.
"""

import contextlib
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rm.data import data_set_readers as of_set
from rm.data import demonstration_readers as text
from rm.data import messages, unknown_records, unread_keys
from rm.data import reply_readers as replies
from rm.data.fields import Fields, is_empty, is_list_of_strings
from rm.data.key_names import DIALOGUES, PROMPTS, REPLIES
from rm.data.messages import Seen
from rm.data.sample import Sample

SFT, PREFERENCE = "train_sft.py", "train_rm.py"

TIED_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)  # fmt: skip


@dataclass(frozen=True)
class Schema:
    """One row of the table."""

    name: str
    script: str  # that reads it
    keys: tuple[str, ...]  # that make it
    read: "Callable[[Fields], Sample]"
    source: str  # the loader or data set it is known from
    when: Callable[[dict], bool] | None = None  # what the values have to be, where the keys alone do not tell
    subset: str = "subset"  # the key by which its records name their part of the data


@dataclass
class Reader:
    """Converts records to samples, and counts what it recognizes and passes over.

    Args:
        script: SFT or PREFERENCE.
        data_keys: our name of a key -> the name that the records have for it.
        ignore_keys: keys of records and messages to pass over.
        attributes: names of the numbers that each record gives its text, in it or in its `attributes`.
    """

    script: str
    data_keys: dict[str, str] = field(default_factory=dict)
    ignore_keys: frozenset[str] = frozenset()
    attributes: tuple[str, ...] = ()
    used: set[str] = field(default_factory=set)  # keys of records that were read
    passed_over: set[str] = field(default_factory=set)  # keys without meaning
    found: set[str] = field(default_factory=set)  # of `data_keys`, those whose key a record had
    ignored: set[str] = field(default_factory=set)  # of `ignore_keys`, those that a record or a message had
    tied: int = 0  # pairs whose two sides have equal scores, or that are marked as a tie, in keys without meaning here
    _candidates: dict[tuple[str, ...], list[Schema]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self._seen = Seen(frozenset(self.ignore_keys), self.passed_over, self.ignored)

    def schema_of(self, record: dict) -> Schema:
        """The schema of a record that `prepared` returned."""
        keys = tuple(record)
        if keys not in self._candidates:
            if halves := [key for key in keys if re.search("[\ud800-\udfff]", key)]:
                raise ValueError(f"has the key {halves[0]!r} with half of a surrogate pair, which is no character")
            self._candidates[keys] = [row for row in SCHEMAS if record.keys() >= set(row.keys)]
        candidates = [row for row in self._candidates[keys] if row.when is None or row.when(record)]
        for row in candidates:
            # Many a record of another schema has a key `text`, which is its prompt or a rendering of all of it.
            is_other = row.name == "text_only" and (candidates != [row] or unknown_records.remedy(record) is not None)
            if row.script == self.script and not is_other:
                return row
        kind = "; --attributes reads single replies and their numbers" if self.attributes else ""
        raise ValueError(unknown_records.explain(record, self.script, candidates, KNOWN) + kind)

    def prepared(self, record: dict) -> dict:
        """A record without nulls, which mean absence, its keys renamed as the settings say."""
        self.ignored |= record.keys() & self.ignore_keys
        if None in record.values():
            record = {key: value for key, value in record.items() if value is not None}
        if not self.data_keys and not self.ignore_keys:
            return record
        record = {key: value for key, value in record.items() if key not in self.ignore_keys}
        named = {ours: theirs for ours, theirs in self.data_keys.items() if theirs in record}
        self.found.update(named)
        theirs = set(named.values())
        # A key of this name has to make way for the one that the settings want in its place.
        self.passed_over |= (named.keys() & record.keys()) - theirs
        rest = {key: value for key, value in record.items() if key not in theirs and key not in named}
        return rest | {ours: record[key] for ours, key in named.items()}

    def sample(self, record: dict) -> Sample:
        """The sample of one record.

        Raises:
            ValueError: no schema fits, a value is not what it should be, or something would be lost.
        """
        try:
            return self._sample(self.prepared(record), record)
        except RecursionError:
            raise ValueError("is nested too deeply for a record of texts") from None

    def _sample(self, record: dict, with_nulls: dict) -> Sample:
        schema = self.schema_of(record)
        fields = Fields(record, self._seen)
        weight = self._weight(fields)
        try:
            sample = schema.read(fields)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            # A value is of another type than in the data sets of this schema.
            raise ValueError(f"is not as records of {schema.name} are: {type(error).__name__}, {error}") from None
        if len({_system_of(text) for text in sample.texts}) > 1:
            raise ValueError("has other system messages on its two sides, which would reveal the better one")
        fields.used.update(("id", "subset", schema.subset))
        subset = str(record.get(schema.subset) or record.get("subset") or "")
        name = schema.name
        if name == "/".join(schema.keys) and fields.prompt_key and fields.prompt_key not in schema.keys:
            name = f"{fields.prompt_key}/{name}"
        attributes = fields.attributes(record, self.attributes)
        sample = replace(sample, schema=name, id=record.get("id"), subset=subset, weight=weight, attributes=attributes)
        if self.script == PREFERENCE and unread_keys.lacks_prompt(with_nulls, sample):
            sample = replace(sample, lacks_prompt=True)
        if sample.joined_by is not None:  # it is one reply of a sample
            fields.used.discard("weight")
        self.used |= record.keys() & fields.used
        if unread := record.keys() - fields.used:
            self._check_unread(record, unread, fields.used, sample)
        return sample

    def _weight(self, fields: Fields) -> float:
        """The factor of the loss of a preference, or of a text's attributes, which records of any schema may have."""
        weight = replies.number_or(1.0, fields, "weight") if self.script == PREFERENCE or self.attributes else 1.0
        if weight < 0:
            raise ValueError(f"'weight' is {weight:g}; expected the factor of the loss, 0 or more")
        return weight

    def _check_unread(self, record: dict, unread: set[str], used: set[str], sample: Sample) -> None:
        """Refuse keys that carry something which the sample lacks; the others are passed over."""
        keys = unread_keys.sort_out(record, unread, used, sample, is_preference=self.script == PREFERENCE)
        if lost := keys.lost:
            remedy = unknown_records.remedy(record) or (
                f"rename a key that should be with --data_keys, or pass over with --ignore_keys {' '.join(lost)}"
            )
            them = "it" if len(lost) == 1 else "them"
            named = " and ".join(map(reprlib.repr, lost[:6])) + (f" and {len(lost) - 6} more" if len(lost) > 6 else "")
            raise ValueError(f"has {named} beside {sample.schema}, which does not use {them}: {remedy}")
        if perhaps := keys.perhaps_prompts:
            raise ValueError(
                f"has no prompt beside {sample.schema}, but the key {perhaps[0]!r}: if it is the prompt, "
                f"--data_keys prompt={perhaps[0]}; if not, pass it over with --ignore_keys {' '.join(perhaps)}"
            )
        if perhaps := keys.perhaps_verdicts:
            raise ValueError(
                f"has {perhaps[0]!r} beside {sample.schema}, of which nothing says which is better: if that does, "
                f"--data_keys winner={perhaps[0]}; if not, pass it over with --ignore_keys {' '.join(perhaps)}"
            )
        self.passed_over |= keys.passed_over
        if self.script == PREFERENCE and _is_tied(record):
            self.tied += 1


def _system_of(text) -> str | None:
    return text[0]["content"] if isinstance(text, list) and text[0]["role"] == "system" else None


def scripts_for(record: dict, data_keys: dict[str, str], ignore_keys: frozenset[str]) -> list[str]:
    """The training scripts that have a schema for a record."""
    found = []
    for script in (SFT, PREFERENCE):
        reader = Reader(script, data_keys, ignore_keys)
        with contextlib.suppress(ValueError):
            reader.schema_of(reader.prepared(record))
            found.append(script)
    return found


def demonstration(record: dict) -> Sample:
    """The sample of one record for SFT."""
    return Reader(SFT).sample(record)


def preference(record: dict) -> Sample:
    """The sample of one record with replies to compare or to score."""
    return Reader(PREFERENCE).sample(record)


def _is_tied(record: dict) -> bool:
    """Whether a pair's two sides have the same score, under the names that data sets have for it."""
    for chosen, rejected in TIED_SCORES:
        if chosen in record and record[chosen] == record.get(rejected):
            return True
    return record.get("status") == "tie"  # distilabel


def _has(key: str, *names: str) -> Callable[[dict], bool]:
    """Whether a value is a list of objects that have these names."""

    def when(record: dict) -> bool:
        value = record[key]
        first = value[0] if isinstance(value, list) and value else None
        return isinstance(first, dict) and all(name in first for name in names)

    return when


def _has_prompt(record: dict) -> bool:
    return any(key in record for key in (*PROMPTS, "messages"))


def _is_word(key: str) -> Callable[[dict], bool]:
    return lambda record: isinstance(record[key], str | int)


def _is_text(key: str) -> Callable[[dict], bool]:
    """Whether the reply is a string, one message, or a list of messages."""

    def when(record: dict) -> bool:
        value = record[key]
        first = value[0] if isinstance(value, list) and value else value
        return isinstance(value, str) or (isinstance(first, dict) and messages.role_of(first) is not None)

    return when


def _is_text2text(record: dict) -> bool:
    return isinstance(record["output"], str) and not any(key in record for key in PROMPTS if key != "input")


def _has_dialogue(record: dict) -> bool:
    return any(not is_empty(record[key]) for key in DIALOGUES if key in record)


def _has_three_of_each(record: dict) -> bool:
    """Whether it is a record of RM-Bench, and not one of RewardBench 2's Ties."""
    three = all(is_list_of_strings(record[key]) and len(record[key]) == 3 for key in ("chosen", "rejected"))
    return three and "num_correct" not in record and record.get("subset") != "Ties"


def _preference(
    name: str, keys: str, read: Callable, source: str, when: Callable | None = None, subset: str = "subset"
) -> Schema:
    return Schema(name, PREFERENCE, tuple(keys.split()), read, source, when, subset)


def _demonstration(name: str, keys: str, read: Callable, source: str, when: Callable | None = None) -> Schema:
    return Schema(name, SFT, tuple(keys.split()), read, source, when)


# fmt: off
PREFERENCES = (
    # two replies, and which of them is better
    _preference("OpenAI's preferences", "input preferred_output non_preferred_output", of_set.openai_preference,
                "OpenAI guides, direct preference optimization"),
    _preference("tinker's comparisons", "comparison label", of_set.comparison,
                "tinker-cookbook preference/preference_datasets.py"),
    _preference("ms-swift's messages/rejected_response", "messages rejected_response", of_set.rejected_response,
                "ms-swift dataset/preprocessor/core.py"),
    _preference("ms-swift's messages/rejected_messages", "messages rejected_messages",
                replies.pair("messages", "rejected_messages"), "ms-swift dataset/preprocessor/core.py"),
    _preference("RMB pairs", "conversation_input chosen reject", replies.pair("chosen", "reject"),
                "Zhou-Zoey/RMB-Reward-Model-Benchmark", subset="category_path"),
    _preference("RMB best of n", "conversation_input bon_best loser_list", of_set.best_and_losers,
                "Zhou-Zoey/RMB-Reward-Model-Benchmark", subset="category_path"),
    _preference("RM-Bench", "id prompt chosen rejected", replies.pair("chosen", "rejected"), "THU-KEG/RM-Bench README",
                when=_has_three_of_each, subset="domain"),
    _preference("HelpSteer3", "response1 response2 overall_preference",
                replies.signed("response1", "response2", "overall_preference"),
                "NeMo-RL preference_datasets/helpsteer3.py", subset="domain"),
    _preference("HelpSteer2-preference", "prompt response_1 response_2 preference_strength",
                replies.signed("response_1", "response_2", "preference_strength"), "data card nvidia/HelpSteer2"),
    _preference("distilabel-capybara-dpo", "conversation generation_prompt chosen rejected", of_set.capybara_dpo,
                "data card argilla/distilabel-capybara-dpo-7k-binarized"),
    _preference("PPE correctness", "prompt response_1 response_2 scores", of_set.best_of_k,
                "data card lmarena-ai/PPE-GPQA-Best-of-K"),
    _preference("PPE preference", "question_id prompt model_a model_b response_1 response_2 winner",
                replies.voted("response_1", "response_2", "winner"), "data card lmarena-ai/PPE-Human-Preference-V1"),
    _preference("Arena 55k", "prompt response_a response_b winner_model_a winner_model_b", of_set.arena_55k,
                "Kaggle, LMSYS Chatbot Arena human preference predictions"),
    _preference("PKU-SafeRLHF", "prompt response_0 response_1 better_response_id",
                replies.by_index("response_0", "response_1", "better_response_id"),
                "data card PKU-Alignment/PKU-SafeRLHF"),
    _preference("JudgeBench", "question response_A response_B label",
                replies.voted("response_A", "response_B", "label"), "ScalerLab/JudgeBench README", subset="source"),
    _preference("SHP", "history human_ref_A human_ref_B labels", of_set.shp, "data card stanfordnlp/SHP"),
    _preference("WebGPT comparisons", "question answer_0 answer_1 score_0 score_1", of_set.webgpt,
                "data card openai/webgpt_comparisons", when=lambda record: isinstance(record["question"], dict)),
    _preference("summarize_from_feedback", "info summaries choice", of_set.summaries,
                "TRL examples/datasets/tldr_preference.py"),
    _preference("OffsetBias", "instruction output_1 output_2 label",
                replies.numbered("output_1", "output_2", "label"), "data card NCSOFT/offsetbias"),
    _preference("Preference-Collection", "orig_instruction orig_response_A orig_response_B orig_preference",
                of_set.preference_collection, "data card prometheus-eval/Preference-Collection"),
    _preference("MultiPref", "text completion_a completion_b normal_worker_annotations", of_set.multipref,
                "data card allenai/multipref"),
    _preference("conversation_a/conversation_b/winner", "conversation_a conversation_b winner",
                replies.conversations("conversation_a", "conversation_b"),
                "FastChat clean_battle_data.py (Arena 33k, 100k, MT-Bench), tinker-cookbook (Arena 140k)"),
    _preference("messages_a/messages_b/winner", "messages_a messages_b winner",
                replies.conversations("messages_a", "messages_b"), "data card lmarena-ai/search-arena-24k"),
    # Battles of the arena that nobody judged have a null as their winner.
    *(_preference(f"{first}/{second}", f"{first} {second}", replies.conversations(first, second),
                  "data card lmarena-ai/search-arena-24k")
      for first, second in (("conversation_a", "conversation_b"), ("messages_a", "messages_b"))),
    *(_preference(f"{first}/{second}/{verdict}", f"{first} {second} {verdict}", replies.voted(first, second, verdict),
                  "data card lmarena-ai/PPE-Human-Preference-V1, Kaggle WSDM Cup; own data", when=_is_word(verdict))
      for first, second in (("response_a", "response_b"), ("response_A", "response_B"), ("response_1", "response_2"),
                            ("response1", "response2"), ("completion_a", "completion_b"), ("answer_a", "answer_b"),
                            ("output_1", "output_2"))
      for verdict in ("winner", "preference", "label")),
    *(_preference(f"{better}/{worse}", f"{better} {worse}", replies.pair(better, worse), source)
      for better, worse, source in (
          ("chosen", "rejected", "TRL dataset_formats, OpenRLHF datasets/reward_dataset.py, Anthropic/hh-rlhf"),
          ("positive", "negative", "LMFlow"),
          ("chosen_response", "rejected_response", "data card argilla/ultrafeedback-binarized-preferences, axolotl"),
          ("chosen_messages", "rejected_messages", "LLaMA-Factory data/v1_dpo_demo.jsonl"),
          ("accepted", "rejected", "data card Vezora/Code-Preference-Pairs"),
          ("response_j", "response_k", "torchtune datasets/_stack_exchange_paired.py"))),
    # Pairs that nobody judged
    *(_preference(f"{first}/{second}", f"{first} {second}", replies.unjudged(first, second), "own data")
      for first, second in (("response_a", "response_b"), ("response_A", "response_B"),
                            ("completion_a", "completion_b"), ("answer_a", "answer_b"))),
    # any number of replies, and their grades
    _preference("context/completions", "context completions", replies.ranked_list("completions", "completion", "rank"),
                "NeMo-RL preference_datasets/preference_dataset.py", when=_has("completions", "rank", "completion")),
    _preference("UltraFeedback", "instruction completions", of_set.ultrafeedback, "OpenBMB/UltraFeedback README",
                when=lambda record: record["completions"] == [] or _has("completions", "response")(record)),
    _preference("Nectar", "prompt answers", replies.ranked_list("answers", "answer", "rank"),
                "open-instruct scripts/data/preferences/nectar.py", when=_has("answers", "answer", "rank")),
    _preference("stack-exchange-preferences", "question answers", replies.scored_list("answers", "text", "pm_score"),
                "data card HuggingFaceH4/stack-exchange-preferences", when=_has("answers", "text", "pm_score")),
    _preference("text_to_scored_textlist", "input output", replies.scored_list("output", "text", "score"),
                "LMFlow utils/constants.py", when=_has("output", "text", "score")),
    _preference("instruction/output, a ranking", "instruction output", replies.best_first,
                "LLaMA-Factory, before 2024-05", when=lambda record: is_list_of_strings(record["output"])),
    _preference("HelpSteer2", "prompt response helpfulness", of_set.rated, "data card nvidia/HelpSteer2"),
    _preference("responses/ranks", "responses ranks", replies.responses("ranks"), "here", when=_has_prompt),
    _preference("responses/scores", "responses scores", replies.responses("scores"), "here", when=_has_prompt),
    _preference("responses", "responses", replies.responses(None), "here", when=_has_prompt),
)
DEMONSTRATIONS = (
    _demonstration("prompt/completion", "prompt completion", text.prompt_and_reply, "TRL dataset_formats"),
    _demonstration("query/answers/tools", "query answers tools", text.tool_answers,
                   "ms-swift dataset/dataset/llm.py (xlam-function-calling)"),
    *(_demonstration("conversation", key, text.conversation,
                     "OpenAI, LMFlow, ShareGPT (LLaMA-Factory data/converter.py), LDJnr/Capybara", when=_has_dialogue)
      for key in ("messages", "conversations", "conversation")),
    _demonstration("text2text", "input output", text.text2text, "LMFlow", when=_is_text2text),
    *(_demonstration(f"{prompt}/{reply}", f"{prompt} {reply}", text.prompt_and_reply,
                     "Alpaca, Dolly, OpenOrca; ms-swift dataset/preprocessor/core.py", when=_is_text(reply))
      for prompt in PROMPTS[:6] for reply in REPLIES),
    _demonstration("inputs/targets", "inputs targets", text.inputs_and_targets,
                   "data card CohereForAI/aya_dataset"),
    _demonstration("text_only", "text", text.text_only, "LMFlow, TRL dataset_formats"),
)
SCHEMAS: tuple[Schema, ...] = PREFERENCES + DEMONSTRATIONS
KNOWN = {key for row in SCHEMAS for key in row.keys}
# fmt: on
