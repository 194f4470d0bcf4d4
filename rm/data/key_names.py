"""What the keys of records mean by their names: which carry text or meaning, and which are without effect here."""

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache

# What a message may have besides role and content. transformers 5 knows a thought by three names.
REASONING = ("reasoning_content", "thinking", "reasoning")
WRITTEN = (*REASONING, "tool_calls", "function_call")  # each has to be written, or the record is refused

SYSTEMS = ("system", "system_prompt", "system_message")
DIALOGUES = ("messages", "conversations", "conversation", "conversation_input", "trajectory")
PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input", "context")
REPLIES = ("response", "output", "completion", "answer", "solution")
TOOLS = ("tools", "functions")

# Keys that carry text. One that a schema does not read is an error, unless the text stands in the sample already.
TEXTS = {
    *SYSTEMS, *DIALOGUES, *PROMPTS, *REPLIES, *TOOLS, *WRITTEN, "history", "sys", "sys_prompt", "instructions",
    "inputs", "contexts", "passage", "document", "documents", "post", "dialogue", "dialog", "chat", "text",
    "completions", "responses", "answers", "chosen", "rejected", "positive", "negative", "rejected_response",
    "chosen_response", "thought", "thoughts", "chain_of_thought", "image", "images", "video", "videos", "audio",
    "audios", "suffix", "prefix", "rejected_tools", "chat_history", "chosen_reasoning", "rejected_reasoning", "cot",
    "think", "choices", "options", "definition", "persona", "system_instruction", "context_messages", "user_prompt",
    "user_input", "preamble", "role_description", "background", "scenario",
}  # fmt: skip
# Keys with numbers, votes and switches. One that a schema does not read is an error.
FACTS = {
    "chat_template_kwargs", "enable_thinking", "label", "labels", "weight", "weights", "sample_weight", "margin",
    "rank", "ranks", "score", "scores", "reward", "rewards", "winner", "preference", "choice", "is_safe", "mask",
    "loss", "train", "kto_tag",
}  # fmt: skip
# Parts of the names of keys that carry what a model thought before it replied, as in s1K's deepseek_thinking_trajectory
THOUGHTS = ("thinking", "reasoning", "thought")
# Keys that say where a record comes from, or what somebody thinks of it: passed over, also if they have text
METADATA = {
    "annotation", "annotations", "annotator", "annotators", "author", "categories", "category", "comment", "comments",
    "copyright", "country", "created", "critique", "dataset", "date", "domain", "error", "error_key", "feedback",
    "filename", "generator", "header", "id", "info", "judge", "judgment", "justification", "lang", "language",
    "license", "markdown", "meta", "metadata", "model", "models", "name", "notes", "origin", "principle", "quality",
    "quotes", "rationale", "rationales", "skill", "source", "sources", "split", "state", "subcategory", "subset",
    "tag", "tags", "task", "timestamp", "title", "tokens", "topic", "topics", "type", "uid", "url", "urls", "uuid",
    "version",
}  # fmt: skip
# Endings and beginnings of the names of such keys, as in prompt_id, chosen_model and labelling_prompt
OF_METADATA = re.compile(
    r"(^|_)(ids?|idx|index|name|type|models?|source|lang|language|len|length|count|tokens|hash|sha256|md5|category|url|"
    r"date|at|timestamp|metadata|path|fingerprint)$|^(raw_)?label?ling_|^(annotator|judge|meta|metadata)[_.]"
)
# A name that is counted, as response_b and prompt_2
COUNTED = re.compile(r"(.+)_(?:\d+|[a-z])")
# Keys of public data sets with text that is not of the records' dialogues: keys by which a set is known -> those
OF_DATA_SETS = {
    ("correct_answers", "completions"): ("correct_answers", "incorrect_answers"),  # openbmb/UltraFeedback
    ("overall_preference", "response1"): ("individual_preference",),  # nvidia/HelpSteer3
    ("human_ref_A", "human_ref_B"): ("score_A", "score_B"),  # stanfordnlp/SHP: the votes on Reddit
    ("full_conversation", "conversation_a"): ("full_conversation",),  # lmarena-ai/arena-human-preference-140k
    ("orig_instruction", "orig_preference"):  # prometheus-eval/Preference-Collection
        ("orig_criteria", "orig_feedback", "orig_feedback_A", "orig_feedback_B", "orig_reference_answer"),
    ("normal_worker_annotations",): ("subject_study", "highest_level_degree"),  # allenai/multipref
    ("all_generated_responses", "all_rm_scores"): ("all_generated_responses",),  # princeton-nlp/llama3-ultrafeedback
    ("gen_input_configs",):  # Magpie-Align
        ("gen_input_configs", "gen_response_configs", "intent", "knowledge", "quality_explanation",
         "other_task_category"),
    ("original_question", "query", "response"): ("original_question",),  # meta-math/MetaMathQA
    ("openai_fingerprint", "seed", "problem"): ("seed",),  # ise-uiuc/Magicoder-OSS-Instruct-75K
    ("correctness_math_verify", "messages"): ("generations", "solution"),  # open-r1/OpenR1-Math-220k
    ("langdetect", "conversations"): ("label", "reward"),  # BAAI/Infinity-Instruct: of a classifier, of a model
    ("generator", "reasoning", "version"): ("reasoning",),  # nvidia/Nemotron-Post-Training-Dataset: on or off
}  # fmt: skip
# A writing without blanks between words
WITHOUT_BLANKS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{3}")


@lru_cache(maxsize=10_000)
def meaning(key: str) -> str | None:
    """ "text" or "fact" where a key is known to carry one, "metadata" where it has no effect; None: it is unknown.

    A key is known by its name in any case and spelling. "like text" is one that only resembles a name: it is likely to
    be misspelled, or has a part of it.
    """
    spelled = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key.strip()).lower().replace(" ", "_").replace("-", "_")
    if spelled in METADATA:
        return "metadata"
    if spelled in TEXTS:
        return "text"
    if spelled in FACTS:
        return "fact"
    if any(part in spelled for part in THOUGHTS):
        return "like text"
    if OF_METADATA.search(spelled):
        return "metadata"
    counted = COUNTED.fullmatch(spelled)
    if counted and (means := meaning(counted[1])):
        return means
    near = difflib.get_close_matches(spelled, TEXTS | FACTS, 1, 0.85)
    near += [name for name in TEXTS | FACTS if sorted(name) == sorted(spelled)]  # two letters have changed places
    if not near:
        return None
    return "like text" if near[0] in TEXTS else "fact"


def of_data_set(record: dict) -> set[str]:
    """The keys of a record that are known to have no effect, as it is one of a public data set."""
    return {key for marks, keys in OF_DATA_SETS.items() if record.keys() >= set(marks) for key in keys}


def is_another(key: str, used: Iterable[str]) -> bool:
    """Whether a key is one more of those that were read, such as response_c beside response_a, or prompt2."""
    counted = r"(.+?)(?:[_ ](?:[a-zA-Z]|\d+)|\d+)"
    match = re.fullmatch(counted, key)
    if match is None:
        return False
    others = (re.fullmatch(counted, name) for name in used)
    return match[1] in used or any(other is not None and other[1] == match[1] for other in others)


def carries_text(value, words: int = 3) -> bool:
    """Whether a value has text in it, of at least so many words."""
    if isinstance(value, str):
        return len(value.split()) >= words or WITHOUT_BLANKS.search(value) is not None
    if isinstance(value, dict):
        return any(carries_text(entry, words) for entry in value.values())
    return isinstance(value, list) and any(carries_text(entry, words) for entry in value)


def is_lost(key: str, value) -> bool:
    """Whether something is lost where nothing reads a key: it is known to carry something, or its value has text."""
    means = meaning(key)
    return means in ("text", "fact") or (means in (None, "like text") and carries_text(value, 1 if means else 3))
