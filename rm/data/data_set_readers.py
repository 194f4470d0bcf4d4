"""Reads the records of single public data sets to compare replies, each by a function from its values to a sample."""

import reprlib
from dataclasses import replace

from rm.data import messages
from rm.data.fields import Fields, join, number
from rm.data.messages import assistant, string, user
from rm.data.reply_readers import answer_of, better_first, compared, grades_in, number_or, two, verdict
from rm.data.sample import Bare, Sample


def shp(fields: Fields) -> Sample:
    fields.record = fields.record | {"prompt": fields.string("history"), "history": None}
    first_is_better = number(fields.get("labels"), "labels")
    if first_is_better not in (0, 1):
        raise ValueError(f"'labels' is {first_is_better:g}; expected 1 (human_ref_A is better) or 0")
    return two(fields, "human_ref_A", "human_ref_B", 2 * first_is_better - 1)


def webgpt(fields: Fields) -> Sample:
    scores = [number(fields.get(key), key) for key in ("score_0", "score_1")]
    fields.record = fields.record | {"question": fields.get("question")["full_text"]}
    return two(fields, "answer_0", "answer_1", scores[0] - scores[1])


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
    texts, label = better_first(texts, wins[0] - wins[1])
    return Sample("", texts, [1.0, 0.0], label)


def _list_of_turns(value, key: str) -> list[str]:
    turns = messages.parsed(value)
    if not isinstance(turns, list):
        turns = [value]
    return [string("" if turn is None else turn, key) for turn in turns]


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
    return compared(fields, replies, [number(entry.get(scale), scale) for entry in entries])


def best_of_k(fields: Fields) -> Sample:
    """PPE's correctness sets: response_1, response_2, ..., which of them are right, and pairs of these to compare."""
    replies = []
    while f"response_{len(replies) + 1}" in fields.record:
        key = f"response_{len(replies) + 1}"
        replies.append((key, fields.get(key)))
    correct = [int(value) if isinstance(value, bool) else value for value in fields.get("scores")]
    sample = compared(fields, replies, grades_in(correct, "scores", len(replies)))
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
    replies = [(key, answer_of(reply, key, fields)) for key, reply in replies]
    return compared(fields, replies, [1.0] + [0.0] * len(losers))


def rated(fields: Fields) -> Sample:
    """One reply of HelpSteer2, graded by its helpfulness. `rm.data.reader` joins those of a prompt."""
    prompt = fields.string("prompt")
    grade = [number(fields.get("helpfulness"), "helpfulness")]
    fields.used.update(("correctness", "coherence", "complexity", "verbosity"))
    text = join(messages.prompt_of(prompt), fields.string("response"), "response")
    return Sample("", [text], grade, joined_by=prompt)


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
    return replace(compared(fields, replies, [1.0, 0.0]), margin=margin)


def openai_preference(fields: Fields) -> Sample:
    inner = fields.get("input")
    fields.check_inner(inner, "input", ("messages", "tools", "parallel_tool_calls"))
    fields.record = fields.record | {key: inner[key] for key in ("messages", "tools") if inner.get(key)}
    replies = [(key, fields.get(key)) for key in ("preferred_output", "non_preferred_output")]
    fields.used.update(("messages", "tools", "parallel_tool_calls"))
    return compared(fields, replies, [1.0, 0.0])


def comparison(fields: Fields) -> Sample:
    inner = fields.get("comparison")
    fields.check_inner(inner, "comparison", ("prompt_conversation", "completion_A", "completion_B"))
    fields.record = {"label": fields.get("label"), "messages": inner.get("prompt_conversation")} | {
        key: inner.get(key) for key in ("completion_A", "completion_B")
    }
    preferred = verdict(fields.get("label"), "label", "A", "B")
    return two(fields, "completion_A", "completion_B", preferred)


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
    preferred = verdict(fields.get("orig_preference"), "orig_preference", "A", "B")
    return two(fields, "orig_response_A", "orig_response_B", preferred)


MULTIPREF = {"A-is-clearly-better": 2, "A-is-slightly-better": 1, "Tie": 0, "B-is-slightly-better": -1,
             "B-is-clearly-better": -2}  # fmt: skip


def multipref(fields: Fields) -> Sample:
    """The mean of what all annotators prefer overall."""
    votes = [*fields.get("normal_worker_annotations"), *(fields.get("expert_worker_annotations") or [])]
    preferred = sum(MULTIPREF[vote["overall_pref"]] for vote in votes)
    fields.record = fields.record | {"prompt": fields.get("text")}
    return two(fields, "completion_a", "completion_b", preferred)
