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
    "user_input",
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
    "critique", "dataset", "date", "domain", "error", "error_key", "feedback", "generator", "header", "id", "info",
    "judge", "judgment", "justification", "lang", "language", "license", "meta", "metadata", "model", "models", "name",
    "notes", "origin", "principle", "quality", "quotes", "rationale", "rationales", "skill", "source", "sources",
    "split", "subset", "tag", "tags", "task", "timestamp", "title", "tokens", "topic", "topics", "type", "uid", "url",
    "urls", "uuid", "version",
}  # fmt: skip
# Endings of the names of such keys, as in prompt_id and chosen_model
OF_METADATA = re.compile(
    r"(^|_)(ids?|idx|index|name|type|models?|source|lang|language|len|length|count|tokens|hash|sha256|md5|category|url|"
    r"date|at|timestamp|[0-9ab])$"
)
# A writing without blanks between words
WITHOUT_BLANKS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{3}")


@lru_cache(maxsize=10_000)
def meaning(key: str) -> str | None:
    """ "text" or "fact" where a key is known to carry one, "metadata" where it has no effect; None: it is unknown.

    A key is known by its name in any case and spelling, and so is one that is likely to be misspelled.
    """
    spelled = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key.strip()).lower().replace(" ", "_").replace("-", "_")
    if any(part in spelled for part in THOUGHTS):
        return "text"
    if spelled in METADATA:
        return "metadata"
    is_known = spelled in TEXTS or spelled in FACTS
    if not is_known and OF_METADATA.search(spelled):
        return "metadata"
    near = [spelled] if is_known else difflib.get_close_matches(spelled, TEXTS | FACTS, 1, 0.85)
    near += [name for name in TEXTS | FACTS if sorted(name) == sorted(spelled)]  # two letters have changed places
    if not near:
        return None
    return "text" if near[0] in TEXTS else "fact"


def is_another(key: str, used: Iterable[str]) -> bool:
    """Whether a key is one more of those that were read, such as response_c beside response_a, or prompt2."""
    counted = r"(.+?)(?:[_ ](?:[a-zA-Z]|\d+)|\d+)"
    match = re.fullmatch(counted, key)
    if match is None:
        return False
    others = (re.fullmatch(counted, name) for name in used)
    return match[1] in used or any(other is not None and other[1] == match[1] for other in others)


def carries_text(value) -> bool:
    """Whether a value has text in it, of three words at least."""
    if isinstance(value, str):
        return len(value.split()) > 2 or WITHOUT_BLANKS.search(value) is not None
    if isinstance(value, dict):
        return any(map(carries_text, value.values()))
    return isinstance(value, list) and any(map(carries_text, value))


def is_lost(key: str, value) -> bool:
    """Whether something is lost where nothing reads a key: it is known to carry something, or its value has text."""
    means = meaning(key)
    return means in ("text", "fact") or (means is None and carries_text(value))
