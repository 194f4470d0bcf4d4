"""rm.data.tokenizer_config: settings that decide ids are of the right type, or one error names file, key and value."""

import pytest

from rm.data import chat
from rm.data.tokenizer import Tokenizer
from tests.text_fixtures import byte_level, write_json

END = "<|endoftext|>"


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": {"content": END, "__type": "AddedToken", "lstrip": False}, "bos_token": None},
        {"eos_token": END, "additional_special_tokens": [END, {"content": END}], "extra_special_tokens": {}},
        {"eos_token": END, "sp_model_kwargs": {}, "split_special_tokens": False, "added_tokens_decoder": {}},
        # Of other software, or without effect on ids.
        {"eos_token": END, "model_max_length": 1e30, "padding_side": "left", "clean_up_tokenization_spaces": False}
        | {"auto_map": {"AutoTokenizer": ["x", None]}, "errors": "replace", "unsloth": [1], "add_eos_token": True},
    ],
)  # fmt: skip
def test_settings_of_others_are_passed_over(tmp_path, settings):
    assert Tokenizer(byte_level(tmp_path, settings)).encode("the cat") == Tokenizer(tmp_path).encode("the cat")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eos_token": 2}, "eos_token 2 has to be of type string or object"),
        ({"eos_token": {"lstrip": True}}, "the setting 'eos_token.content' is missing"),
        ({"additional_special_tokens": ["a", 3]}, r"additional_special_tokens\[1\] 3 has to be of type string or obj"),
        ({"added_tokens_decoder": {"400": "x"}}, r"added_tokens_decoder\['400'\] 'x' has to be of type object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder has to name tokens by their ids"),
        ({"added_tokens_decoder": {"400": {"content": "a", "strip": True}}}, r"\['400'\].strip True is not implem"),
        ({"add_bos_token": "yes"}, "add_bos_token 'yes' has to be of type true or false"),
        ({"split_special_tokens": True}, "split_special_tokens True is not implemented"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs.enable_sampling True is not implemented"),
        ({"tokenizer_class": ["a"]}, "tokenizer_class .* has to be of type string"),
    ],
)
def test_a_setting_of_another_type_or_with_an_effect_on_ids_is_refused(tmp_path, settings, message):
    byte_level(tmp_path, {"eos_token": END} | settings)
    with pytest.raises(ValueError, match=rf"tokenizer_config.json: .*{message}"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "template, message",
    [
        ({"default": "x"}, "chat_template .* has to be of type string or list"),
        ([{"name": "default"}], r"the setting 'chat_template\[0\].template' is missing"),
        (["x"], r"chat_template\[0\] 'x' has to be of type object"),
        ([{"name": 1, "template": "x"}], r"chat_template\[0\].name 1 has to be of type string"),
        (7, "chat_template 7 has to be of type string or list"),
    ],
)
def test_a_malformed_chat_template_is_one_error(tmp_path, template, message):
    tokenizer = Tokenizer(byte_level(tmp_path / "model"))
    byte_level(tmp_path / "other", {"chat_template": template})
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {message}"):
        chat.choose_template(str(tmp_path / "other"), None, tokenizer)


def test_the_files_of_older_versions_are_checked_too(tmp_path):
    byte_level(tmp_path, {"eos_token": END})
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": 3})
    with pytest.raises(ValueError, match="special_tokens_map.json: pad_token 3 has to be of type string or object"):
        Tokenizer(tmp_path)
    write_json(tmp_path / "special_tokens_map.json", {})
    write_json(tmp_path / "added_tokens.json", {"<x>": "400"})
    with pytest.raises(ValueError, match="added_tokens.json: the id of '<x>', '400' has to be of type whole number"):
        Tokenizer(tmp_path)
