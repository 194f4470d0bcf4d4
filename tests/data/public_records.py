"""One small record of each public schema, in the form that its data set or loader has, and what it says.

The records' texts are invented. Their keys and types are those of the files and loaders that `rm.data.schemas` cites.
"""

from rm.data.messages import assistant, user

Q, A, B, C = "2+2?", "4", "5", "six"
SYSTEM = {"role": "system", "content": "Be brief."}


def dialogue(*contents, system=False):
    turns = [(user, assistant)[n % 2](content) for n, content in enumerate(contents)]
    return [SYSTEM, *turns] if system else turns


def parts(text):
    return [{"type": "text", "text": text, "image": None, "mimeType": None}]


def from_value(*contents):
    return [{"from": ("human", "gpt")[n % 2], "value": content} for n, content in enumerate(contents)]


QA, QB, QC = dialogue(Q, A), dialogue(Q, B), dialogue(Q, C)
PAIR = [QA, QB]  # the better one first
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

# name -> (record, schema, dialogues, grade of each): the better one of a pair first, at a tie in the record's order
PREFERENCES = {
    "Anthropic HH": (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        "chosen/rejected", PAIR, [1, 0],
    ),
    "LMFlow": ({"positive": "###Human: 2+2?###Assistant: 4", "negative": "###Human: 2+2?###Assistant: 5"},
               "positive/negative", PAIR, [1, 0]),
    "Dahoas full-hh-rlhf": (
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "response": " 4", "chosen": " 4", "rejected": " 5"},
        "prompt/chosen/rejected", PAIR, [1, 0],
    ),
    "a prompt and replies that repeat it": (
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
         "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        "prompt/chosen/rejected", PAIR, [1, 0],
    ),
    "TRL": ({"prompt": [user(Q)], "chosen": [assistant(A)], "rejected": [assistant(B)]},
            "prompt/chosen/rejected", PAIR, [1, 0]),
    "TRL, implicit prompt": ({"chosen": QA, "rejected": QB}, "chosen/rejected", PAIR, [1, 0]),
    "messages in JSON": (
        {"chosen": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]',
         "rejected": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]'},
        "chosen/rejected", PAIR, [1, 0],
    ),
    "UltraFeedback binarized": (
        {"prompt": Q, "prompt_id": "h", "chosen": QA, "rejected": QB, "messages": QA, "score_chosen": 8.5,
         "score_rejected": 7.0},
        "prompt/chosen/rejected", PAIR, [1, 0],
    ),
    "UltraFeedback cleaned": (
        {"source": "s", "prompt": Q, "chosen": QA, "chosen-rating": 5.0, "chosen-model": "m", "rejected": QB,
         "rejected-rating": 3.0, "rejected-model": "n"},
        "prompt/chosen/rejected", PAIR, [1, 0],
    ),
    "a prompt that is the last turn": (
        {"prompt": "2+2? ", "chosen": dialogue("hi", "hello", Q, A), "rejected": dialogue("hi", "hello", Q, B)},
        "prompt/chosen/rejected", [dialogue("hi", "hello", Q, A), dialogue("hi", "hello", Q, B)], [1, 0],
    ),
    "distilabel-capybara-dpo": (
        {"source": "s", "conversation": [{"input": Q, "output": A}], "original_response": A, "generation_prompt": ["p"],
         "raw_generation_responses": ["r"], "new_generations": [B], "prompt": "p", "chosen": QA, "rejected": QB,
         "rating_chosen": 5, "rating_rejected": 2, "chosen_model": "m", "rejected_model": "n"},
        "distilabel-capybara-dpo", PAIR, [1, 0],
    ),
    "orca_dpo_pairs": (
        {"system": "Be brief.", "question": Q, "chosen": A, "rejected": B},
        "question/chosen/rejected", [dialogue(Q, A, system=True), dialogue(Q, B, system=True)], [1, 0],
    ),
    "distilabel-intel-orca": (
        {"system": "", "input": Q, "chosen": A, "rejected": B, "generations": [A, B], "order": ["chosen", "rejected"],
         "labelling_model": "gpt", "rating": [9.0, 7.0], "rationale": "r", "status": "unchanged",
         "original_chosen": A, "original_rejected": B, "chosen_score": 9.0, "in_gsm8k_train": False},
        "input/chosen/rejected", PAIR, [1, 0],
    ),
    "LLaMA-Factory, Alpaca": ({"instruction": "Add.", "input": Q, "chosen": A, "rejected": B, "history": []},
                              "instruction/chosen/rejected", [dialogue(f"Add.\n{Q}", A), dialogue(f"Add.\n{Q}", B)],
                              [1, 0]),
    "LLaMA-Factory, with a history": (
        {"instruction": Q, "input": "", "chosen": A, "rejected": B, "history": [["hi", "hello"]]},
        "instruction/chosen/rejected", [dialogue("hi", "hello", Q, A), dialogue("hi", "hello", Q, B)], [1, 0],
    ),
    "LLaMA-Factory, ShareGPT": (
        {"conversations": from_value(Q), "chosen": {"from": "gpt", "value": A}, "rejected": {"from": "gpt", "value": B},
         "system": "Be brief."},
        "conversations/chosen/rejected", [dialogue(Q, A, system=True), dialogue(Q, B, system=True)], [1, 0],
    ),
    "LLaMA-Factory, before 2024-05": ({"instruction": Q, "input": "", "output": [A, B]},
                                      "instruction/output, a ranking", PAIR, [2, 1]),
    "axolotl, chat_template": (
        {"messages": [SYSTEM, user(Q)], "chosen": assistant(A), "rejected": assistant(B)},
        "messages/chosen/rejected", [dialogue(Q, A, system=True), dialogue(Q, B, system=True)], [1, 0],
    ),
    "ms-swift": ({"messages": QA, "rejected_response": B}, "ms-swift's messages/rejected_response", PAIR, [1, 0]),
    "ms-swift, whole": ({"messages": QA, "rejected_messages": QB}, "ms-swift's messages/rejected_messages", PAIR,
                        [1, 0]),
    "OpenAI": (
        {"input": {"messages": [user(Q)], "tools": [], "parallel_tool_calls": True}, "preferred_output": [assistant(A)],
         "non_preferred_output": [assistant(B)]},
        "OpenAI's preferences", PAIR, [1, 0],
    ),
    "tinker-cookbook": (
        {"comparison": {"prompt_conversation": [user(Q)], "completion_A": [assistant(B)],
                        "completion_B": [assistant(A)]}, "label": "B"},
        "tinker's comparisons", PAIR, [1, 0],
    ),
    "hh_rlhf_cn": (
        {"context": [{"role": "human", "text": Q}], "chosen": {"role": "assistant", "text": A},
         "rejected": {"role": "assistant", "text": B}},
        "context/chosen/rejected", PAIR, [1, 0],
    ),
    "argilla ultrafeedback": (
        {"source": "s", "instruction": Q, "chosen_response": A, "rejected_response": B, "chosen_avg_rating": 5.0,
         "rejected_avg_rating": 1.0, "chosen_model": "m"},
        "instruction/chosen_response/rejected_response", PAIR, [1, 0],
    ),
    "LLaMA-Factory v1": (
        {"chosen_messages": [{"role": "user", "content": [{"type": "text", "value": Q}]},
                             {"role": "assistant", "content": [{"type": "text", "value": A}]}],
         "rejected_messages": QB},
        "chosen_messages/rejected_messages", PAIR, [1, 0],
    ),
    "Vezora Code-Preference-Pairs": (
        {"instruction": "Fix it.", "input": Q, "accepted": A, "rejected": B, "ID": "1"},
        "instruction/accepted/rejected", [dialogue(f"Fix it.\n{Q}", A), dialogue(f"Fix it.\n{Q}", B)], [1, 0],
    ),
    "stack-exchange-paired": (
        {"qid": 1, "question": Q, "date": "2010", "metadata": ["u"], "response_j": A, "response_k": B},
        "question/response_j/response_k", PAIR, [1, 0],
    ),
    "stack-exchange-preferences": (
        {"qid": 1, "question": Q, "answers": [{"answer_id": 1, "pm_score": 0, "selected": False, "text": B},
                                              {"answer_id": 2, "pm_score": 4, "selected": True, "text": A}]},
        "stack-exchange-preferences", [QB, QA], [0, 4],
    ),
    "UltraInteract": (
        {"task": "Coding", "dataset": "d", "id": "0", "parent_id": "p", "trajectory": [{"from": "user", "value": Q}],
         "chosen": A, "rejected": B},
        "trajectory/chosen/rejected", PAIR, [1, 0],
    ),
    "context/completions": (
        {"context": [user(Q)], "completions": [{"rank": 1, "completion": [assistant(B)]},
                                               {"rank": 0, "completion": [assistant(A)]}], "task_name": "t"},
        "context/completions", [QB, QA], [-1, 0],
    ),
    "HelpSteer3": (
        {"domain": "general", "language": "english", "context": [user(Q)], "response1": B, "response2": A,
         "overall_preference": 2, "individual_preference": [{"score": 2, "reasoning": "r", "feedback1": "f"}]},
        "HelpSteer3", PAIR, [1, 0],
    ),
    "HelpSteer3, a tie": ({"context": [user(Q)], "response1": A, "response2": B, "overall_preference": 0},
                          "HelpSteer3", PAIR, [0, 0]),
    "HelpSteer2-preference": (
        {"split": "train", "prompt": Q, "response_1": A, "response_2": B, "preference_strength": -1,
         "preference_statement": "p", "preference_elaboration": "e"},
        "HelpSteer2-preference", PAIR, [1, 0],
    ),
    "RewardBench": ({"prompt": Q, "chosen": A, "chosen_model": "a", "rejected": B, "rejected_model": "b",
                     "subset": "math", "id": 1}, "prompt/chosen/rejected", PAIR, [1, 0]),
    "RewardBench 2": ({"id": "0", "prompt": Q, "chosen": [A], "rejected": [B, C], "num_correct": 1,
                       "total_completions": 3, "subset": "Ties"}, "prompt/chosen/rejected", [QA, QB, QC], [1, 0, 0]),
    "RM-Bench": (
        {"id": "1", "prompt": Q, "chosen": [A, C, A], "rejected": [B, B, B], "domain": "chat",
         "error_key": "e", "error": "what is wrong in the rejected replies"},
        "RM-Bench", [QA, QC, QA, QB, QB, QB], [1, 1, 1, 0, 0, 0],
    ),
    "RewardBench 2, Ties": (
        {"id": "tied:0", "prompt": Q, "chosen": [A, C, A], "rejected": [B, B, B], "subset": "Ties"},
        "prompt/chosen/rejected", [QA, QC, QA, QB, QB, QB], [1, 1, 1, 0, 0, 0],
    ),
    "RMB pairs": (
        {"pair_uid": "u", "conversation_input": [user(Q)], "chosen": {"answer": A, "llm_name": "m"},
         "reject": {"answer": B, "llm_name": "n"}},
        "RMB pairs", PAIR, [1, 0],
    ),
    "RMB best of n": (
        {"bon_uid": "u", "conversation_input": [user(Q)], "bon_best": {"answer": A, "llm_name": "m"},
         "loser_list": [{"answer": B, "llm_name": "n"}, {"answer": C, "llm_name": "o"}]},
        "RMB best of n", [QA, QB, QC], [1, 0, 0],
    ),
    "JudgeBench": (
        {"pair_id": "u", "original_id": 6603, "source": "mmlu", "question": Q, "response_model": "m", "response_A": B,
         "response_B": A, "label": "B>A"},
        "JudgeBench", PAIR, [1, 0],
    ),
    "PPE human": (
        {"question_id": "u", "model_a": "m", "model_b": "n", "prompt": Q, "response_1": A, "response_2": B,
         "winner": "model_a", "language": "English", "is_code": False},
        "PPE preference", PAIR, [1, 0],
    ),
    "PPE correctness": (
        {"question_id": "q", "prompt": Q, "model_name": "m", "response_1": B, "response_2": A, "response_3": C,
         "scores": [False, True, False], "mean_score": 0.3, "sampled_conflict_pairs": [[0, 1]]},
        "PPE correctness", [QB, QA, QC], [0, 1, 0],
    ),
    "Arena 33k": (
        {"question_id": "u", "model_a": "m", "model_b": "n", "winner": "tie (bothbad)", "judge": "j",
         "conversation_a": QA, "conversation_b": QB, "turn": 1, "anony": True, "language": "English", "tstamp": 1.0},
        "conversation_a/conversation_b/winner", PAIR, [0, 0],
    ),
    "Arena 140k": (
        {"id": "1", "model_a": "x", "model_b": "y", "winner": "model_b",
         "conversation_a": [{"role": "user", "content": parts(Q)}, {"role": "assistant", "content": parts(B)}],
         "conversation_b": [{"role": "user", "content": parts(Q)}, {"role": "assistant", "content": parts(A)}],
         "full_conversation": [], "is_code": False},
        "conversation_a/conversation_b/winner", PAIR, [1, 0],
    ),
    "MT-Bench human": (
        {"question_id": 81, "model_a": "m", "model_b": "n", "winner": "model_a", "judge": "a", "turn": 1,
         "conversation_a": dialogue(Q, A, "3+3?", "6"), "conversation_b": dialogue(Q, B, "3+3?", "7")},
        "conversation_a/conversation_b/winner", PAIR, [1, 0],
    ),
    "search-arena": ({"messages_a": QA, "messages_b": QB, "winner": "model_a", "judge": "j"},
                     "messages_a/messages_b/winner", PAIR, [1, 0]),
    "Arena 55k": (
        {"id": 30192, "model_a": "m", "model_b": "n", "prompt": '["2+2?", "And?"]', "response_a": '["5", null]',
         "response_b": '["4", "so"]', "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        "Arena 55k", [dialogue(Q, A, "And?", "so"), dialogue(Q, B, "And?", "")], [1, 0],
    ),
    "Kaggle WSDM Cup": (
        {"id": "1", "prompt": Q, "response_a": B, "response_b": A, "winner": "model_b", "model_a": "m", "model_b": "n",
         "language": "English"},
        "prompt/response_a/response_b/winner", PAIR, [1, 0],
    ),
    "own data": ({"prompt": Q, "response_a": A, "response_b": B, "winner": "tie"},
                 "prompt/response_a/response_b/winner", PAIR, [0, 0]),
    "PKU-SafeRLHF": (
        {"prompt": Q, "response_0": B, "response_1": A, "prompt_source": "p", "is_response_0_safe": True,
         "is_response_1_safe": False, "response_0_harm_category": {"Violence": False}, "better_response_id": 1,
         "safer_response_id": 0},
        "PKU-SafeRLHF", PAIR, [1, 0],
    ),
    "SHP": (
        {"post_id": "q", "domain": "d", "upvote_ratio": 0.98, "history": Q, "score_A": 340, "score_B": 166,
         "human_ref_A": A, "human_ref_B": B, "labels": 1, "seconds_difference": 2.0, "score_ratio": 2.048},
        "SHP", PAIR, [1, 0],
    ),
    "WebGPT": (
        {"question": {"dataset": "eli5", "id": "x", "full_text": Q}, "quotes_0": {"title": [], "extract": []},
         "answer_0": B, "tokens_0": {"prefix": [1], "completion": [2]}, "score_0": -0.5, "answer_1": A, "score_1": 0.5},
        "WebGPT comparisons", PAIR, [1, 0],
    ),
    "summarize_from_feedback": (
        {"info": {"id": "t3_a", "post": "P", "title": "T", "subreddit": "AskReddit", "site": None, "article": None},
         "summaries": [{"text": " B", "policy": "s", "note": None}, {"text": " A", "policy": "s", "note": None}],
         "choice": 1, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": None}},
        "summarize_from_feedback",
        [dialogue("SUBREDDIT: r/AskReddit\n\nTITLE: T\n\nPOST: P\n\nTL;DR:", reply) for reply in (" A", " B")], [1, 0],
    ),
    "OffsetBias": ({"id": "1", "source": "s", "type": "t", "instruction": Q, "output_1": B, "output_2": A, "label": 2},
                   "OffsetBias", PAIR, [1, 0]),
    "Preference-Collection": (
        {"orig_instruction": Q, "orig_response_A": A, "orig_response_B": B, "orig_score_A": "4", "orig_score_B": "2",
         "orig_preference": "A", "orig_criteria": "c", "instruction": "judge", "input": "", "output": "[RESULT] A"},
        "Preference-Collection", PAIR, [1, 0],
    ),
    "MultiPref": (
        {"comparison_id": "c", "prompt_id": "p", "text": Q, "model_a": "m", "completion_a": B, "model_b": "n",
         "completion_b": A, "source": "s", "category": "x",
         "normal_worker_annotations": [{"overall_pref": "A-is-slightly-better"}],
         "expert_worker_annotations": [{"overall_pref": "B-is-clearly-better"}]},
        "MultiPref", PAIR, [1, 0],
    ),
    "UltraFeedback": (
        {"source": "s", "instruction": Q, "models": ["m", "n"], "correct_answers": ["None"],
         "incorrect_answers": ["None"],
         "completions": [{"model": "m", "custom_system_prompt": "c", "response": A, "annotations": {},
                          "fine-grained_score": 5.0, "overall_score": 9.0},
                         {"model": "n", "response": B, "annotations": {}, "fine-grained_score": 2.0,
                          "overall_score": 10.0}]},
        "UltraFeedback", PAIR, [5, 2],
    ),
    "Nectar": (
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant: ", "answers": [{"answer": A, "model": "m", "rank": 1.0},
                                                               {"answer": B, "model": "n", "rank": 2.0}],
         "turns": 1, "num_responses": 2, "source": ["lmsys"], "good_natured": True},
        "Nectar", PAIR, [-1, -2],
    ),
    "LMFlow text_to_scored_textlist": ({"input": Q, "output": [{"score": 1.0, "text": A}, {"score": -0.8, "text": B}]},
                                       "text_to_scored_textlist", PAIR, [1, -0.8]),
    "HelpSteer2-preference, several turns": (
        {"prompt": f"hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\n{Q}", "response_1": A, "response_2": B,
         "preference_strength": -3},
        "HelpSteer2-preference", [dialogue("hi", "hello", Q, A), dialogue("hi", "hello", Q, B)], [1, 0],
    ),
    "messages as pandas writes them to CSV": ({"prompt": "", "chosen": str(QA), "rejected": str(QB), "margin": ""},
                                              "chosen/rejected", PAIR, [1, 0]),
    "Anthropic HH with a system message": (
        {"system": "Be brief.", "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
         "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        "chosen/rejected", [dialogue(Q, A, system=True), dialogue(Q, B, system=True)], [1, 0],
    ),
    "a last question, and full texts": (
        {"prompt": Q, "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        "prompt/chosen/rejected", PAIR, [1, 0],
    ),
    "HelpSteer2": (
        {"prompt": f"hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\n{Q}", "response": A, "helpfulness": 4,
         "correctness": 4, "coherence": 4, "complexity": 0, "verbosity": 0},
        "HelpSteer2", [dialogue("hi", "hello", Q, A)], [4],
    ),
    "ranks": ({"prompt": Q, "responses": [B, A], "ranks": [2, 1]}, "prompt/responses/ranks", [QB, QA], [-2, -1]),
    "scores": ({"question": Q, "responses": [B, A], "scores": [0.1, 2]}, "question/responses/scores", [QB, QA],
               [0.1, 2]),
}  # fmt: skip

# name -> (record, schema, dialogue or plain text, positions of the messages that carry no loss)
DEMONSTRATIONS = {
    "LMFlow text_only": ({"text": "###Human: 2+2?###Assistant: 4"}, "text_only", "###Human: 2+2?###Assistant: 4", ()),
    "LMFlow text2text": ({"input": Q, "output": A}, "text2text", QA, ()),
    "LMFlow conversation": ({"conversation_id": 7, "system": "Be brief.", "tools": [""], "messages": QA},
                            "conversation", dialogue(Q, A, system=True), ()),
    "Alpaca": ({"instruction": "Add.", "input": Q, "output": A, "text": f"Below is ...\nAdd.\n{Q}\n### Response:\n{A}"},
               "instruction/output", dialogue(f"Add.\n{Q}", A), ()),
    "Alpaca, no input": ({"instruction": Q, "input": "", "output": A}, "instruction/output", QA, ()),
    "Dolly": ({"instruction": "Add.", "context": Q, "response": A, "category": "open_qa"}, "instruction/response",
              dialogue(f"Add.\n{Q}", A), ()),
    "OpenOrca": ({"id": "1", "system_prompt": "Be brief.", "question": Q, "response": A}, "question/response",
                 dialogue(Q, A, system=True), ()),
    "ShareGPT": ({"id": "x", "conversations": from_value(Q, A), "system": "Be brief."}, "conversation",
                 dialogue(Q, A, system=True), ()),
    "ShareGPT with tools": (
        {"conversations": [{"from": "human", "value": Q},
                           {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                           {"from": "observation", "value": "ok"}, {"from": "gpt", "value": A}],
         "tools": '[{"name": "f", "description": "d", "parameters": {}}]'},
        "conversation",
        [user(Q), assistant("") | {"tool_calls": [CALL]}, {"role": "tool", "content": "ok"}, assistant(A)], (),
    ),
    "OpenAI fine-tuning": (
        {"messages": [user(Q), assistant(B) | {"weight": 0}, user("Sure?"), assistant(A) | {"weight": 1}],
         "parallel_tool_calls": False},
        "conversation", dialogue(Q, B, "Sure?", A), (1,),
    ),
    "axolotl": ({"messages": [user(Q), assistant(B) | {"train": False}, user("Sure?"), assistant(A)]}, "conversation",
                dialogue(Q, B, "Sure?", A), (1,)),
    "ms-swift": ({"messages": [user(Q), assistant(B) | {"loss": False}, user("Sure?"), assistant(A)]}, "conversation",
                 dialogue(Q, B, "Sure?", A), (1,)),
    "LLaMA-Factory v1": (
        {"messages": [user(Q), assistant(B) | {"loss_weight": 0.0}, user("Sure?"),
                      assistant(A) | {"loss_weight": 1.0}]},
        "conversation", dialogue(Q, B, "Sure?", A), (1,),
    ),
    "torchtune": ({"messages": [user(Q), assistant(B) | {"masked": True}, user("Sure?"), assistant(A)]},
                  "conversation", dialogue(Q, B, "Sure?", A), (1,)),
    "tinker": ({"messages": [user(Q), assistant(B) | {"trainable": False}, user("Sure?"), assistant(A)]},
               "conversation", dialogue(Q, B, "Sure?", A), (1,)),
    "a call without a content": (
        {"messages": [user(Q), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"},
                      assistant(A)]},
        "conversation", [user(Q), assistant("") | {"tool_calls": [CALL]}, {"role": "tool", "content": "4"},
                         assistant(A)], (),
    ),
    "other roles": ({"messages": [{"role": "User", "content": Q}, {"role": "Assistant", "content": A}]},
                    "conversation", QA, ()),
    "a thought": ({"messages": [user(Q), assistant(A) | {"reasoning_content": "two and two", "tool_calls": None}]},
                  "conversation", [user(Q), assistant(A) | {"reasoning_content": "two and two"}], ()),
    "TRL prompt/completion": ({"prompt": Q, "completion": A}, "prompt/completion", QA, ()),
    "TRL prompt/completion of messages": (
        {"prompt": dialogue("hi", "hello", Q), "completion": [assistant(A)]}, "prompt/completion",
        dialogue("hi", "hello", Q, A), (1,),
    ),
    "LLaMA-Factory, with a history": (
        {"instruction": Q, "output": A, "history": [["hi", "hello"]], "system": "Be brief."}, "instruction/output",
        dialogue("hi", "hello", Q, A, system=True), (),
    ),
    "Capybara": ({"source": "s", "conversation": [{"input": "hi", "output": "hello"}, {"input": Q, "output": A}]},
                 "conversation", dialogue("hi", "hello", Q, A), ()),
    "UltraFeedback binarized, for SFT": (
        {"prompt": Q, "prompt_id": "h", "chosen": QA, "rejected": QB, "messages": QA, "score_chosen": 8.5},
        "conversation", QA, (),
    ),
    "xlam": ({"id": 0, "query": Q, "answers": '[{"name": "f", "arguments": {"x": 1}}]',
              "tools": '[{"name": "f", "description": "d", "parameters": {}}]'}, "query/answers/tools",
             [user(Q), assistant("") | {"tool_calls": [CALL]}], ()),
    "Aya": ({"inputs": Q, "targets": A, "language": "English", "user_id": "u"}, "inputs/targets", QA, ()),
}  # fmt: skip

# More keys that the records of a set have, with texts as long as theirs. They change nothing. From the data cards.
SAID = "Somebody says of it that it is good."
MORE_KEYS = {
    "UltraFeedback": {"models": ["a", "b"], "correct_answers": [SAID], "incorrect_answers": [SAID, SAID]},
    "HelpSteer3": {"individual_preference": [{"score": 2, "reasoning": SAID, "feedback1": SAID, "feedback2": SAID}]},
    "Arena 140k": {"full_conversation": [{"user": user(Q), "model_side_a": assistant(SAID)}], "evaluation_order": 1},
    "distilabel-intel-orca": {"labelling_prompt": [user(SAID)], "raw_labelling_response": SAID},
    "Preference-Collection": {"orig_criteria": SAID, "orig_feedback_A": SAID, "orig_reference_answer": SAID},
    "MultiPref": {"subject_study": "Computer Science and Mathematics", "highest_level_degree": "Bachelor of Arts"},
    "RewardBench 2": {"additional_metadata": {"method": SAID}},
    "PPE human": {"is_code": False, "hard_prompt": True, "easy_prompt": False, "if_prompt": False},
    "SHP": {"score_A": 5, "score_B": 3, "c_root_id_A": "x", "seconds_difference": 4.0},
    "UltraFeedback binarized": {"all_generated_responses": [A, B, SAID], "all_rm_scores": [0.2, 0.1, 0.1]},  # SimPO's
    "OpenOrca": {"reasoning_tokens": 12, "is_reasoning_complete": [True], "filename": "the file of it"},
    "Alpaca": {"copyright": "暂无版权及作者信息", "subcategory": "Brake Systems and Control"},  # COIG-CQIA
    "ShareGPT": {
        "gen_input_configs": {"extract_input": SAID}, "intent": SAID, "knowledge": SAID, "quality_explanation": SAID,
    },  # Magpie
    "Dolly": {"country": "United States of America", "state": "New South Wales State"},  # WildChat
    "LMFlow conversation": {"langdetect": "en", "label": {"ability_en": [SAID]}, "reward": 3.5,
                            "conversations": QA},  # Infinity-Instruct
    "UltraFeedback binarized, for SFT": {
        "correctness_math_verify": [True], "generations": [SAID], "solution": SAID, "problem": Q,
    },  # OpenR1-Math
    "TRL prompt/completion": {"generator": "r", "reasoning": "off", "version": "v1"},  # Nemotron-Post-Training
}  # fmt: skip
