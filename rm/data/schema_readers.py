"""What each schema becomes: functions from the values of a record to a sample. `rm.data.schemas` has the table."""

import reprlib
from collections.abc import Callable
from dataclasses import replace

from rm.data import messages
from rm.data.fields import (
    Fields,
    as_messages,
    is_list_of_strings,
    is_whole,
    join,
    number,
    with_system,
)
from rm.data.key_names import DIALOGUES, PROMPTS, REPLIES
from rm.data.messages import Message, Seen, Text, assistant, string, strings_in, user
from rm.data.sample import Bare, Sample

# What means that a reply is the better one of two, in the columns called winner, label, preference
FIRST = {"a", "model_a", "response_a", "a>b", "a>>b", "assistant_a", "model_1", "response_1"}
SECOND = {"b", "model_b", "response_b", "b>a", "b>>a", "assistant_b", "model_2", "response_2"}
TIE = {"tie", "tied", "draw", "both", "both_good", "both_bad", "bothbad", "tie_(bothbad)", "a=b", "equal", "neither"}


def _compared(
    fields: Fields, replies: list[tuple[str, object]], grade: list[float] | None, label: float = 1.0
) -> Sample:
    """The sample of a prompt's replies.

    Args:
        replies: (what to call it in messages, the reply as it is in the record) of each.
    """
    whole = [is_whole(value) for _, value in replies]
    prompt = fields.prompt(is_whole=any(whole))
    if isinstance(prompt, list) and fields.prompt_key in DIALOGUES and prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"has {fields.prompt_key!r} that end with a reply, behind which no other one can stand; remove it, or pass "
            f"them over with --ignore_keys {fields.prompt_key}"
        )
    texts, tools = [], fields.tools()
    for key, value in replies:
        if isinstance(value, dict) and "messages" in value:  # LMFlow's dialogues have a system message and tools
            fields.check_inner(value, key, ("messages", "system", "tools", "conversation_id"))
            reply, own_tools = _lmflow_dialogue(value, key, fields.seen)
            if own_tools != tools and texts:
                raise ValueError("has other tools on its two sides, which would reveal the better one")
            tools = own_tools
        else:
            reply = messages.text(value, key, fields.seen)
        texts.append(join(prompt, reply, key))
    turns = as_messages(prompt)
    if any(whole) and not all(whole) and not all(_continues(text, turns) for text in texts):
        raise ValueError("has replies that are whole dialogues, and others that lack the turns of these; add them")
    return Sample("", texts, grade, label, tools=tools, template_kwargs=fields.template_kwargs())


def _continues(text: Text | Bare, turns: list[Message]) -> bool:
    """Whether a text is a prompt of these turns and a reply."""
    text = text.dialogue() if isinstance(text, Bare) else text
    contents = [[message["content"].strip() for message in part] for part in (text[: len(turns)], turns)]
    return bool(turns) and contents[0] == contents[1] and text[len(turns)]["role"] == "assistant"


def _lmflow_dialogue(value: dict, key: str, seen: Seen) -> tuple[list[Message], list[dict] | None]:
    dialogue = messages.dialogue(value["messages"], f"{key} messages", seen)
    if value.get("system"):
        dialogue = with_system(string(value["system"], f"{key} system"), dialogue, f"{key} messages")
    return dialogue, messages.tools_in(value.get("tools"), f"{key} tools")


def pair(better: str, worse: str) -> Callable[[Fields], Sample]:
    """Reads a pair whose better reply stands under one key and whose worse one under another."""

    def read(fields: Fields) -> Sample:
        chosen, rejected = (_answer(fields.get(key), key, fields) for key in (better, worse))
        if isinstance(chosen, str) and chosen in fields.record:
            raise ValueError(f"{better!r} is {chosen!r}, the name of another key: --data_keys winner={better}")
        if is_list_of_strings(chosen) and is_list_of_strings(rejected):  # RewardBench 2, RM-Bench: many of each
            replies = [(f"{better} {n}", reply) for n, reply in enumerate(chosen, 1)]
            replies += [(f"{worse} {n}", reply) for n, reply in enumerate(rejected, 1)]
            return _compared(fields, replies, [1.0] * len(chosen) + [0.0] * len(rejected))
        label, margin = number_or(1.0, fields, "label"), number_or(0.0, fields, "margin")
        if not 0 <= label <= 1:
            raise ValueError(f"'label' is {label:g}; expected the probability, 0 to 1, that the first text is better")
        sample = _compared(fields, [(better, chosen), (worse, rejected)], [1.0, 0.0], label)
        return replace(sample, margin=margin) if margin else sample

    return read


def number_or(default: float, fields: Fields, key: str) -> float:
    """A number, or the default where a record has none, or an empty field of a CSV file."""
    value = fields.get(key)
    return default if value is None or value == "" else number(value, key)


def _answer(value, key: str, fields: Fields):
    """A reply that is an object of its text and the model it came from (RMB), as its text."""
    if not isinstance(value, dict) or not isinstance(value.get("answer"), str):
        return value
    fields.check_inner(value, key, ("answer", "llm_name"))
    return value["answer"]


def _two(fields: Fields, first: str, second: str, preferred: float) -> Sample:
    """A pair of replies, of which the first is better where `preferred` is positive; 0 is a tie."""
    sides, label = _better_first([(key, fields.get(key)) for key in (first, second)], preferred)
    return _compared(fields, sides, [1.0, 0.0], label)


def _better_first(sides: list, preferred: float) -> tuple[list, float]:
    """(two sides, the better one first, the label of the pair); the first is better where `preferred` is positive."""
    return (sides[::-1] if preferred < 0 else sides), (1.0 if preferred else 0.5)


def unjudged(first: str, second: str) -> Callable[[Fields], Sample]:
    """Reads two replies of which nothing says which is better."""
    return lambda fields: _compared(fields, [(key, fields.get(key)) for key in (first, second)], None)


def voted(first: str, second: str, verdict: str) -> Callable[[Fields], Sample]:
    """Reads two replies and a word that says which is better."""

    def read(fields: Fields) -> Sample:
        return _two(fields, first, second, _verdict(fields.get(verdict), verdict, first, second))

    return read


def _verdict(value, key: str, first: str, second: str) -> float:
    """1 for the first, -1 for the second, 0 for a tie."""
    word = "_".join(str(value).strip().lower().split())
    if word in FIRST or word == first.lower():
        return 1.0
    if word in SECOND or word == second.lower():
        return -1.0
    if word in TIE or word.startswith("tie_("):
        return 0.0
    raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected {first} or a, {second} or b, or tie")


def signed(first: str, second: str, key: str) -> Callable[[Fields], Sample]:
    """Reads two replies and a number from -3 to 3, negative where the first is better (HelpSteer).

    How far it is from 0 is the strength of the preference.
    """

    def read(fields: Fields) -> Sample:
        preferred = number(fields.get(key), key)
        if not -3 <= preferred <= 3:
            raise ValueError(f"{key!r} is {preferred:g}; expected -3 (the first is better) to 3 (the second is)")
        prompt = fields.record.get("prompt")
        if isinstance(prompt, str) and HELPSTEER_TURN in prompt:
            fields.record = fields.record | {"prompt": _helpsteer_turns(prompt)}
        return replace(_two(fields, first, second, -preferred), strength=abs(preferred))

    return read


def by_index(first: str, second: str, key: str) -> Callable[[Fields], Sample]:
    """Reads two replies and the index, 0 or 1, of the better one; -1 is a tie."""

    def read(fields: Fields) -> Sample:
        index = number(fields.get(key), key)
        if index not in (-1, 0, 1):
            raise ValueError(f"{key!r} is {index:g}; expected 0 or 1, the index of the better reply, or -1")
        return _two(fields, first, second, 0.0 if index == -1 else 1.0 - 2.0 * index)

    return read


def numbered(first: str, second: str, key: str) -> Callable[[Fields], Sample]:
    """Reads two replies and the number, 1 or 2, of the better one."""

    def read(fields: Fields) -> Sample:
        better = number(fields.get(key), key)
        if better not in (1, 2):
            raise ValueError(f"{key!r} is {better:g}; expected 1 or 2, the number of the better reply")
        return _two(fields, first, second, 3.0 - 2.0 * better)

    return read


# ------------------------------------------------------------------------------------------------ single data sets


def shp(fields: Fields) -> Sample:
    fields.record = fields.record | {"prompt": fields.string("history"), "history": None}
    first_is_better = number(fields.get("labels"), "labels")
    if first_is_better not in (0, 1):
        raise ValueError(f"'labels' is {first_is_better:g}; expected 1 (human_ref_A is better) or 0")
    return _two(fields, "human_ref_A", "human_ref_B", 2 * first_is_better - 1)


def webgpt(fields: Fields) -> Sample:
    scores = [number(fields.get(key), key) for key in ("score_0", "score_1")]
    fields.record = fields.record | {"question": fields.get("question")["full_text"]}
    return _two(fields, "answer_0", "answer_1", scores[0] - scores[1])


def arena_55k(fields: Fields) -> Sample:
    """Each side is a dialogue: JSON lists of the user's turns and of a model's replies."""
    prompts, *sides = (_list_of_turns(fields.get(key), key) for key in ("prompt", "response_a", "response_b"))
    wins = [number(fields.get(key), key) for key in ("winner_model_a", "winner_model_b")]
    tie = number(fields.get("winner_tie"), "winner_tie") if "winner_tie" in fields.record else 1 - sum(wins)
    if sorted((*wins, tie)) != [0, 0, 1]:
        raise ValueError(f"has the winners {wins[0]:g}, {wins[1]:g} and {tie:g} (a tie); expected one 1, and else 0")
    texts = []
    for replies in sides:
        if len(replies) != len(prompts):
            raise ValueError(f"has {len(prompts)} turns of 'prompt' and {len(replies)} replies; expected one for each")
        turns = [(user(prompt), assistant(reply)) for prompt, reply in zip(prompts, replies, strict=True)]
        texts.append([message for turn in turns for message in turn])
    texts, label = _better_first(texts, wins[0] - wins[1])
    return Sample("", texts, [1.0, 0.0], label)


def _list_of_turns(value, key: str) -> list[str]:
    turns = messages.parsed(value)
    if not isinstance(turns, list):
        turns = [value]
    return [string("" if turn is None else turn, key) for turn in turns]


def conversations(first: str, second: str) -> Callable[[Fields], Sample]:
    """Reads two whole dialogues and the winner; MT-Bench's are judged at a `turn`, up to which they are read."""

    def read(fields: Fields) -> Sample:
        turn = fields.get("turn")
        sides = [messages.dialogue(fields.get(key), key, fields.seen) for key in (first, second)]
        if turn is not None:
            sides = [_up_to(side, number(turn, "turn")) for side in sides]
        if (winner := fields.get("winner")) is None:
            return Sample("", sides)
        sides, label = _better_first(sides, _verdict(winner, "winner", first, second))
        return Sample("", sides, [1.0, 0.0], label)

    return read


def _up_to(dialogue: list[Message], turn: float) -> list[Message]:
    """A dialogue up to the reply of this number."""
    replies = [i for i, message in enumerate(dialogue) if message["role"] == "assistant"]
    if turn not in range(1, len(replies) + 1):
        raise ValueError(f"'turn' is {turn:g}; expected the number of a reply, 1 to {len(replies)}")
    return dialogue[: replies[int(turn) - 1] + 1]


def summaries(fields: Fields) -> Sample:
    """summarize_from_feedback, with the prompts of TRL's examples/datasets/tldr_preference.py."""
    info, summaries, choice = fields.get("info"), fields.get("summaries"), fields.get("choice")
    title = info.get("title") or ""
    if info.get("article"):
        prompt = f"TITLE: {title}\n\n{info['article']}\n\nTL;DR:"
    else:
        prompt = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {title}\n\nPOST: {info.get('post')}\n\nTL;DR:"
    if choice not in (0, 1):
        raise ValueError(f"'choice' is {reprlib.repr(choice)}; expected 0 or 1")
    texts = [Bare(prompt, string(summaries[i]["text"], "summaries")) for i in (choice, 1 - choice)]
    return Sample("", texts, [1.0, 0.0])


def ultrafeedback(fields: Fields) -> Sample:
    """Graded by the mean of its four aspects; its overall_score is known to be wrong in places."""
    entries, fine = fields.get("completions"), "fine-grained_score"
    for n, entry in enumerate(entries, 1):
        known = ("response", fine, "overall_score", "custom_system_prompt", "annotations", "critique")
        fields.check_inner(entry, f"completions {n}", known)
    replies = [(f"completions {n}", entry.get("response")) for n, entry in enumerate(entries, 1)]
    # The two scales differ: 1 to 5, and 1 to 10.
    scale = fine if all(entry.get(fine) is not None for entry in entries) else "overall_score"
    return _compared(fields, replies, [number(entry.get(scale), scale) for entry in entries])


def scored_list(key: str, text: str, grade: str) -> Callable[[Fields], Sample]:
    """Reads a list of objects that hold a reply and its score, higher for better."""

    def read(fields: Fields) -> Sample:
        entries = fields.get(key)
        for n, entry in enumerate(entries, 1):
            fields.check_inner(entry, f"{key} {n}", (text, grade))
        replies = [(f"{key} {n}", entry.get(text)) for n, entry in enumerate(entries, 1)]
        return _compared(fields, replies, [number(entry.get(grade), grade) for entry in entries])

    return read


def ranked_list(key: str, text: str, rank: str) -> Callable[[Fields], Sample]:
    """Reads a list of objects that hold a reply and its rank, lower for better."""
    read_scored = scored_list(key, text, rank)

    def read(fields: Fields) -> Sample:
        sample = read_scored(fields)
        return replace(sample, grade=[-rank for rank in sample.grade])

    return read


def responses(grades: str | None) -> Callable[[Fields], Sample]:
    """Reads `responses`, and `ranks` (1 is the best) or `scores`, if there are any."""

    def read(fields: Fields) -> Sample:
        values = messages.parsed(fields.get("responses"))
        if not isinstance(values, list) or not values:
            raise ValueError(f"'responses' is {reprlib.repr(values)}; expected a list of responses")
        grade = None if grades is None else _grades(fields.get(grades), grades, len(values))
        if grades == "ranks":
            grade = [-rank for rank in grade]
        return _compared(fields, [(f"responses {n}", value) for n, value in enumerate(values, 1)], grade)

    return read


def _grades(values, key: str, n: int) -> list[float]:
    values = messages.parsed(values)
    if not isinstance(values, list) or len(values) != n:
        raise ValueError(f"{key!r} is {reprlib.repr(values)}; expected one number for each of {n} responses")
    return [number(value, key) for value in values]


def best_of_k(fields: Fields) -> Sample:
    """PPE's correctness sets: response_1, response_2, ..., which of them are right, and pairs of these to compare."""
    replies = []
    while f"response_{len(replies) + 1}" in fields.record:
        key = f"response_{len(replies) + 1}"
        replies.append((key, fields.get(key)))
    correct = [int(value) if isinstance(value, bool) else value for value in fields.get("scores")]
    sample = _compared(fields, replies, _grades(correct, "scores", len(replies)))
    pairs = fields.get("sampled_conflict_pairs")
    return sample if pairs is None else replace(sample, compared=_index_pairs(pairs, len(replies)))


def _index_pairs(value, n: int) -> tuple[tuple[int, int], ...]:
    """Pairs of indices of n replies."""
    pairs = [tuple(pair) if isinstance(pair, list) else () for pair in value] if isinstance(value, list) else [()]
    if not all(len(pair) == 2 and all(type(i) is int and 0 <= i < n for i in pair) for pair in pairs):
        raise ValueError(
            f"'sampled_conflict_pairs' is {reprlib.repr(value)}; expected pairs of indices of {n} responses, from 0"
        )
    return tuple(pairs)


def best_and_losers(fields: Fields) -> Sample:
    losers = fields.get("loser_list")
    replies = [("bon_best", fields.get("bon_best"))]
    replies += [(f"loser_list {n}", reply) for n, reply in enumerate(losers, 1)]
    replies = [(key, _answer(reply, key, fields)) for key, reply in replies]
    return _compared(fields, replies, [1.0] + [0.0] * len(losers))


def rated(fields: Fields) -> Sample:
    """One reply of HelpSteer2, graded by its helpfulness. `rm.data.reader` joins those of a prompt."""
    prompt = fields.string("prompt")
    grade = [number(fields.get("helpfulness"), "helpfulness")]
    fields.used.update(("correctness", "coherence", "complexity", "verbosity"))
    if HELPSTEER_TURN not in prompt:
        return Sample("", [Bare(prompt, fields.string("response"))], grade, joined_by=prompt)
    dialogue = _helpsteer_turns(prompt)
    return Sample("", [[*dialogue, assistant(fields.string("response"))]], grade, joined_by=prompt)


HELPSTEER_TURN = "<extra_id_1>"


def _helpsteer_turns(prompt: str) -> list[Message]:
    """The turns of "first question\n<extra_id_1>Assistant\nits reply\n<extra_id_1>User\nnext question"."""
    first, *turns = prompt.split(HELPSTEER_TURN)
    dialogue = [user(first.strip())]
    for turn in turns:
        role, _, content = turn.partition("\n")
        dialogue.append({"Assistant": assistant, "User": user}[role.strip()](content.strip()))
    if dialogue[-1] == assistant(""):
        del dialogue[-1]
    return dialogue


def rejected_response(fields: Fields) -> Sample:
    """ms-swift: `messages` end with the chosen reply, in place of which the rejected one would stand."""
    dialogue = messages.dialogue(fields.get("messages"), "messages", fields.seen)
    is_user = [message["role"] == "user" for message in dialogue]
    if True not in is_user:
        raise ValueError("'messages' has no message of the user, behind which the chosen reply is")
    start = len(dialogue) - is_user[::-1].index(True)  # the chosen reply is all that follows the last user message
    rejected = fields.text("rejected_response")
    if isinstance(rejected, str):
        rejected = [assistant(rejected)]
    fields.record = fields.record | {"messages": dialogue[:start]}
    margin = number_or(0.0, fields, "margin")
    replies = [("messages", dialogue[start:]), ("rejected_response", rejected)]
    return replace(_compared(fields, replies, [1.0, 0.0]), margin=margin)


def openai_preference(fields: Fields) -> Sample:
    inner = fields.get("input")
    fields.check_inner(inner, "input", ("messages", "tools", "parallel_tool_calls"))
    fields.record = fields.record | {key: inner[key] for key in ("messages", "tools") if inner.get(key)}
    replies = [(key, fields.get(key)) for key in ("preferred_output", "non_preferred_output")]
    fields.used.update(("messages", "tools", "parallel_tool_calls"))
    return _compared(fields, replies, [1.0, 0.0])


def comparison(fields: Fields) -> Sample:
    inner = fields.get("comparison")
    fields.check_inner(inner, "comparison", ("prompt_conversation", "completion_A", "completion_B"))
    fields.record = {"label": fields.get("label"), "messages": inner.get("prompt_conversation")} | {
        key: inner.get(key) for key in ("completion_A", "completion_B")
    }
    preferred = _verdict(fields.get("label"), "label", "A", "B")
    return _two(fields, "completion_A", "completion_B", preferred)


def capybara_dpo(fields: Fields) -> Sample:
    """Its replies are whole dialogues; `prompt` is what the models were given, and `conversation` the source."""
    fields.used.update(("prompt", "conversation"))
    sides = [messages.dialogue(fields.get(key), key, fields.seen) for key in ("chosen", "rejected")]
    return Sample("", sides, [1.0, 0.0])


def preference_collection(fields: Fields) -> Sample:
    # A judge's prompt and answer, which say the same in other words.
    fields.used.update(("instruction", "input", "output"))
    fields.record = {key: value for key, value in fields.record.items() if key not in ("instruction", "input")}
    fields.record["prompt"] = fields.get("orig_instruction")
    preferred = _verdict(fields.get("orig_preference"), "orig_preference", "A", "B")
    return _two(fields, "orig_response_A", "orig_response_B", preferred)


MULTIPREF = {"A-is-clearly-better": 2, "A-is-slightly-better": 1, "Tie": 0, "B-is-slightly-better": -1,
             "B-is-clearly-better": -2}  # fmt: skip


def multipref(fields: Fields) -> Sample:
    """The mean of what all annotators prefer overall."""
    votes = [*fields.get("normal_worker_annotations"), *(fields.get("expert_worker_annotations") or [])]
    preferred = sum(MULTIPREF[vote["overall_pref"]] for vote in votes)
    fields.record = fields.record | {"prompt": fields.get("text")}
    return _two(fields, "completion_a", "completion_b", preferred)


def best_first(fields: Fields) -> Sample:
    replies = [(f"output {n}", reply) for n, reply in enumerate(fields.get("output"), 1)]
    return _compared(fields, replies, [float(len(replies) - n) for n in range(len(replies))])


# -------------------------------------------------------------------------------------------------- demonstrations


def conversation(fields: Fields) -> Sample:
    key = fields.first_of(DIALOGUES)
    if key is None:
        raise ValueError(f"{' and '.join(map(repr, fields.record.keys() & set(DIALOGUES)))}: is empty")
    dialogue = messages.dialogue(fields.get(key), key, fields.seen)
    without_loss = frozenset(fields.seen.without_loss)
    chosen = fields.record.get("chosen")
    if chosen is not None and set(strings_in(chosen)) <= set(strings_in(dialogue)):
        fields.used.add("rejected")  # UltraFeedback has the chosen dialogue for SFT, beside its pairs
    length, system = len(dialogue), fields.system()
    dialogue = [*fields.history(), *dialogue]
    if system is not None:
        dialogue = with_system(system, dialogue, key)
    without_loss = frozenset(i + len(dialogue) - length for i in without_loss)
    return Sample(
        "", [dialogue], tools=fields.tools(), template_kwargs=fields.template_kwargs(), without_loss=without_loss
    )


def text_only(fields: Fields) -> Sample:
    return Sample("", [fields.string("text")])


def prompt_and_reply(fields: Fields) -> Sample:
    """A prompt under any name, with a system message and a history, and its reply. The loss is on the reply alone."""
    key = fields.first_of(REPLIES) or next(key for key in REPLIES if key in fields.record)
    reply = fields.text(key)
    masked = frozenset(fields.seen.without_loss) if isinstance(reply, list) else frozenset()
    prompt = fields.prompt()
    if prompt is None:  # it has one, but that is empty
        prompt = fields.string(next(name for name in PROMPTS if name in fields.record))
    if isinstance(prompt, str) and HELPSTEER_TURN in prompt:
        prompt = _helpsteer_turns(prompt)
    text = join(prompt, reply, key)
    without_loss = frozenset(i + len(text) - len(reply) for i in masked)
    if isinstance(text, list) and not fields.record.get("history"):  # earlier replies are part of the prompt
        of_prompt = (i for i, turn in enumerate(as_messages(prompt)) if turn["role"] == "assistant")
        without_loss = without_loss.union(of_prompt)
    return Sample("", [text], tools=fields.tools(), template_kwargs=fields.template_kwargs(), without_loss=without_loss)


def text2text(fields: Fields) -> Sample:
    return replace(prompt_and_reply(fields), joined_by_default=True)


def inputs_and_targets(fields: Fields) -> Sample:
    return Sample("", [Bare(fields.string("inputs"), fields.string("targets"))])


def tool_answers(fields: Fields) -> Sample:
    """xlam: the reply is a list of calls."""
    call = {"from": "function_call", "value": fields.get("answers")}
    dialogue = [user(fields.string("query")), *messages.dialogue([call], "answers", fields.seen)]
    return Sample("", [dialogue], tools=fields.tools())
