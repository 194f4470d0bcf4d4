"""What a caller may choose when a reward model scores texts; the rest is as in training, which its contract says."""

from dataclasses import dataclass

from rm.config import SettingsGroup, require_positive, setting
from rm.data.chat import BARE_TEXT, DIALOGUE_FORMATS


@dataclass(frozen=True, kw_only=True)
class ScoringTextSettings(SettingsGroup):
    """Texts"""

    chat_template: str | None = setting(
        None, "write dialogues by this Jinja file, or by the chat template of the model in this folder, or "
        "hub:org/name[/FILE]; only where training had no template", hub="template"
    )  # fmt: skip
    dialogue_format: str | None = setting(
        None, "write dialogues in this plain format; only where training had no template", tuple(DIALOGUE_FORMATS)
    )
    bare_text: str | None = setting(
        None, "a prompt and a reply that are both strings become a dialogue, or are joined; none: as in training, else "
        "auto", BARE_TEXT
    )  # fmt: skip
    parse_special_tokens: bool | None = setting(
        None, "strings of special tokens in plain texts are these tokens; none: as in training, else false"
    )
    max_length: int | None = setting(None, "longest text in tokens; none: as in training, else 512")
    overlong: str | None = setting(
        None, "leave out longer texts, or shorten them; none: as in training, else filter", ("filter", "truncate")
    )
    truncation_side: str | None = setting(
        None, "shorten at the beginning (left) or at the end (right); none: as in training, else left",
        ("left", "right"),
    )  # fmt: skip

    def check(self) -> None:
        require_positive(max_length=self.max_length)
        if self.chat_template is not None and self.dialogue_format is not None:
            raise ValueError("--chat_template and --dialogue_format exclude each other: give one")
