"""rm.hf.weights and rm.hf.folder: loading and saving are exact, and every kind of invalid folder has its message."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.distributed.sharding import ParallelSettings
from rm.hf import safetensors_file, saving, weights
from rm.model.attention import SplitAttention
from rm.model.heads import LanguageModel, RewardModel
from tests import tiny
from tests.ranks import run_ranks
from tests.text_fixtures import byte_level, llama_like, sentencepiece_model, write_json

FAMILIES = {"llama": tiny.llama, "gpt_neo": tiny.gpt_neo}
TEXTS = ["what a day!! oh no!!!", "yes", "the capital of france is the capital of the other cat, and again"]


@pytest.fixture
def folder(tmp_path):
    """A llama with an LM head of its own, saved by transformers."""
    return tiny.save_with(tiny.llama(num_key_value_heads=2), tmp_path / "m")


def reward_model(folder, dtype=torch.float32):
    """A reward model initialized from a language model, with a random head."""
    config, *_ = weights.read_config(folder)
    model = RewardModel(config, SplitAttention).to(dtype)
    assert weights.load(model, folder) == {"score.weight"}
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    return model


def save(*args):
    """`saving.save` in a process group of one rank: it has a barrier."""
    with dist.session(seed=0):
        saving.save(*args)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, change):
    """Apply `change` to the tensors of a folder with a single file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_error(folder, head=LanguageModel):
    with pytest.raises(ValueError) as error:
        config, *_ = weights.read_config(folder)
        with torch.device("meta"):
            model = head(config, SplitAttention)
        # On the meta device nothing can be copied: all checks have to come first.
        weights.load(model, folder)
    return str(error.value)


# Loading


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_load_casts_to_the_dtype_of_the_model(tmp_path, stored):
    hf_model = tiny.llama().to(stored)
    tiny.save_with(hf_model, tmp_path / "m")
    assert torch.equal(tiny.ours(tmp_path / "m").norm.weight, hf_model.model.norm.weight.float())
    assert torch.equal(
        tiny.ours(tmp_path / "m", dtype=torch.bfloat16).norm.weight, hf_model.model.norm.weight.bfloat16()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_several_files_loads_as_from_one_file(tmp_path, family):
    hf_model = FAMILIES[family]()
    one = tiny.ours(tiny.save_with(hf_model, tmp_path / "one"))
    many = tiny.ours(tiny.save_with(hf_model, tmp_path / "many", max_shard_size="20KB"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), many.parameters(), strict=True))


@pytest.mark.parametrize("family", tiny.SETTINGS)
def test_a_reward_model_loads_a_base_model_saved_without_a_head(tmp_path, family):
    hf_model = tiny.causal_lm(family)
    tiny.save_with(hf_model.base_model, tmp_path / "base")
    tiny.save_with(hf_model, tmp_path / "lm")
    of_base, of_lm = reward_model(tmp_path / "base"), reward_model(tmp_path / "lm")
    assert all(torch.equal(x, y) for x, y in zip(of_base.layers.parameters(), of_lm.layers.parameters(), strict=True))


def test_load_ignores_a_copy_of_a_tied_head_and_saved_buffers(tmp_path):
    folder = tiny.save_with(tiny.llama(tie_word_embeddings=True), tmp_path / "m")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    before = tiny.ours(folder)
    rewrite(folder, add)
    after = tiny.ours(folder)
    assert all(torch.equal(x, y) for x, y in zip(before.parameters(), after.parameters(), strict=True))


class Counted:
    """Wraps a safetensors file or slice and counts the elements that `get_slice(...)[...]` returns."""

    read = 0

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __enter__(self):
        return Counted(self.inner.__enter__())

    def __exit__(self, *error):
        self.inner.__exit__(*error)

    def get_slice(self, name):
        return Counted(self.inner.get_slice(name))

    def __getitem__(self, index):
        values = self.inner[index]
        Counted.read += values.numel()
        return values


def sharded(folder, head=LanguageModel):
    config, *_ = weights.read_config(folder)
    with torch.device("meta"):
        model = head(config, SplitAttention)
    sharding.parallelize(model, ParallelSettings(dtype="float32"))
    return model.to_empty(device=dist.device())


def load_and_gather(folder):
    safetensors_file.safe_open = lambda *args: Counted(safe_open(*args))  # in this rank's process only
    model = sharded(folder)
    assert weights.load(model, folder) == set()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    shard_size = sum(p.to_local().numel() for p in model.parameters())
    return Counted.read, shard_size, {name: p.full_tensor().detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "family, world", [("llama", 2), ("gpt_neo", 2), ("llama", 5), ("gpt2", 3), ("gpt_neox", 3), ("phi3", 2)]
)
def test_each_rank_reads_only_its_own_rows(tmp_path, family, world):
    folder = tiny.save_with(tiny.causal_lm(family), tmp_path / "m", max_shard_size="20KB")
    full = dict(tiny.ours(folder).named_parameters())
    results = run_ranks(world, load_and_gather, folder)
    for read, shard_size, gathered in results:
        assert read == shard_size
        assert gathered.keys() == full.keys()
        assert all(torch.equal(gathered[name], full[name]) for name in full)
    # The embedding has 99 rows: shards are uneven.
    assert sum(read for read, *_ in results) == sum(p.numel() for p in full.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what is resident of files")
def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path, monkeypatch):
    sizes = dict(hidden_size=256, intermediate_size=2048, num_hidden_layers=4)
    folder = tiny.save_with(tiny.llama(**sizes), tmp_path / "m")
    resident, copy = [], weights._copy

    def copy_and_look(*args):
        copy(*args)
        resident.append(int(re.search(r"RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)

    monkeypatch.setattr(weights, "_copy", copy_and_look)
    model = tiny.ours(folder)  # twice: by the second time, the libraries are in memory
    resident.clear()
    weights.load(model, folder)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 20 * 2**20 and max(resident) - min(resident) < size / 4


# Saving


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_a_saved_model(tmp_path, family, tied):
    hf_model = FAMILIES[family](tie_word_embeddings=tied)
    source = tiny.save_with(hf_model, tmp_path / "m")
    save(tiny.ours(source), tmp_path / "out", source, torch.float32)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), hf_model.parameters(), strict=True))
    tokens = tiny.tokens(40)
    torch.testing.assert_close(tiny.their_logits(loaded, tokens), tiny.their_logits(hf_model, tokens))


@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_saving_a_loaded_model_again_writes_the_same_bytes(tmp_path, folder, limit):
    save(tiny.ours(folder), tmp_path / "a", folder, torch.bfloat16, limit)
    again = tiny.ours(tmp_path / "a")
    save(again, tmp_path / "b", tmp_path / "a", torch.bfloat16, limit)
    first, second = (sorted((tmp_path / name).iterdir()) for name in "ab")
    assert [file.name for file in first] == [file.name for file in second]
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(first, second, strict=True))
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "bfloat16"


def test_files_stay_within_the_size_limit_and_the_index_is_complete(tmp_path, folder):
    save(tiny.ours(folder), tmp_path / "out", folder, torch.float32, 20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    stored = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == stored
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    assert max((tmp_path / "out" / file).stat().st_size for file in files) < 20_000 + 4_000  # tensors and header
    assert not any(AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1].values())


def save_sharded(folder, out):
    model = sharded(folder)
    weights.load(model, folder)
    saving.save(model, out, folder, torch.float32, 20_000)
    return sorted(file.name for file in out.iterdir())  # `save` ends with a barrier: every rank sees the files


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_two_ranks_save_the_same_files_as_one(tmp_path, family):
    folder = tiny.save_with(tiny.causal_lm(family), tmp_path / "m")
    save(tiny.ours(folder), tmp_path / "one", folder, torch.float32, 20_000)
    names, names_of_rank_1 = run_ranks(2, save_sharded, folder, tmp_path / "two")
    assert names == names_of_rank_1
    assert names == sorted(file.name for file in (tmp_path / "one").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_failed_save_leaves_the_old_model_unchanged(tmp_path, folder, monkeypatch):
    model = tiny.ours(folder)
    out = tmp_path / "out"
    save(model, out, folder, torch.float32)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full_disk(*args, **settings):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors_file, "save_file", full_disk)
    for target in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            save(model, target, folder, torch.float32)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_save_replaces_a_model_but_no_other_folder(tmp_path, folder):
    model = tiny.ours(folder)
    for _ in range(2):
        save(model, tmp_path / "out", folder, torch.float32, 20_000)
    save(model, tmp_path / "out", folder, torch.float32)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="papers exists and is not a model"):
        save(model, tmp_path / "papers", folder, torch.float32)
    assert (tmp_path / "papers/thesis.txt").read_text() == "precious"


def test_weights_files_have_the_permissions_of_the_other_files(tmp_path, folder):
    save(tiny.ours(folder), tmp_path / "out", folder, torch.float32, 20_000)
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1


def test_config_json_keeps_the_spelling_of_the_dtype_setting(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    save(tiny.ours(folder), tmp_path / "out", folder, torch.float16)
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["torch_dtype"] == "float16" and "dtype" not in saved


# Reward models


END = "<|endoftext|>"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "make, settings, pad",
    [
        (llama_like, {"eos_token": "</s>"}, "<unk>"),
        (llama_like, {"eos_token": "</s>", "pad_token": {"content": "<s>"}}, "<s>"),
        (llama_like, {"eos_token": "</s>", "pad_token": "</s>", "unk_token": None}, "<unk>"),
        (llama_like, {"eos_token": "</s>", "pad_token": "[PAD]"}, "<unk>"),
        (byte_level, {"eos_token": END}, "\u0120caf\u00c3"),  # no text ends in the middle of a character
        (
            byte_level,
            {"eos_token": END, "bos_token": END, "unk_token": END, "pad_token": END},
            "\u0120caf\u00c3",
        ),
    ],
    ids=[
        "unk_token",
        "pad_token",
        "pad_token is EOS",
        "pad_token has no id",
        "byte-level",
        "byte-level, pad_token is EOS",
    ],
)
def test_transformers_scores_a_padded_batch_like_single_texts_here(tmp_path, family, make, settings, pad):
    folder = tiny.save_with(FAMILIES[family](vocab_size=500), tmp_path / "m")
    make(folder, {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    write_json(folder / "special_tokens_map.json", settings)
    model = reward_model(folder)
    save(model, tmp_path / "out", folder, torch.float32)

    hf_model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    source, tokenizer = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (pad, hf_model.config.pad_token_id)
    assert hf_model.config.pad_token_id != tokenizer.eos_token_id
    texts = [text + tokenizer.eos_token for text in TEXTS]
    assert (
        tokenizer(texts).input_ids == source(texts).input_ids
    )  # the new pad token does not change how texts are tokenized

    sequences = [torch.tensor(ids) for ids in tokenizer(texts).input_ids]
    with torch.no_grad():
        one_by_one = torch.cat([hf_model.eval()(sequence[None]).logits[:, 0] for sequence in sequences])
        batched = hf_model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    assert one_by_one.std() > 0.1
    torch.testing.assert_close(rewards(model, sequences), one_by_one, atol=1e-5, rtol=0)
    torch.testing.assert_close(rewards(model, sequences), batched, atol=1e-5, rtol=0)


@torch.no_grad()
def rewards(model, sequences):
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return model.rewards(
        SimpleNamespace(
            tokens=torch.cat(sequences),
            position=torch.cat([torch.arange(len(sequence)) for sequence in sequences]),
            segments=[(0, len(sequence)) for sequence in sequences],
            reply_end=lengths.cumsum(0) - 1,
        )
    )


def test_the_padding_of_a_sentencepiece_model_is_its_unknown_piece(tmp_path, folder):
    sentencepiece_model(folder)
    save(reward_model(folder), tmp_path / "out", folder, torch.float32)
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == 0
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["pad_token"] == "<unk>"


def test_the_padding_is_never_a_token_without_an_embedding(tmp_path, folder):
    llama_like(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", pad_token="[PAD]")
    for rows, pad in ((tokenizer.get_vocab_size() - 1, "<unk>"), (tokenizer.get_vocab_size(), "[PAD]")):
        source = tiny.save_with(tiny.llama(vocab_size=rows), tmp_path / pad)
        shutil.copytree(folder, source, dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors", "config.json"])
        save(reward_model(source), tmp_path / "out", source, torch.float32)
        assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["pad_token"] == pad


def test_the_padding_is_never_the_end_of_turn_token(tmp_path, folder):
    llama_like(folder)
    for template, pad in (("{{ messages[-1].content }}</s>", "<s>"), ("{{ messages[-1].content }}<s>", "<unk>")):
        edit(folder / "tokenizer_config.json", pad_token="<s>", eos_token="</s>", chat_template=template)
        save(reward_model(folder), tmp_path / "out", folder, torch.float32)
        assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["pad_token"] == pad
    # A template that always fails cannot have been used in training.
    edit(folder / "tokenizer_config.json", chat_template="{{ raise_exception('no') }}<s>")
    save(reward_model(folder), tmp_path / "out", folder, torch.float32)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["pad_token"] == "<s>"


def test_the_padding_without_a_tokenizer_is_an_id_other_than_eos(tmp_path, folder):
    for eos, pad in ((2, 0), (0, 1)):
        edit(folder / "config.json", eos_token_id=eos)
        save(reward_model(folder), tmp_path / "out", folder, torch.float32)
        assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == pad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_head_is_saved_and_loaded_in_fp32(tmp_path, family):
    folder = tiny.save_with(FAMILIES[family](), tmp_path / "m")
    model = reward_model(folder)
    save(model, tmp_path / "out", folder, torch.bfloat16)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16} == {"score.weight"}
    assert torch.equal(tiny.ours(tmp_path / "out", RewardModel).score.weight, model.score.weight)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0"} and "ForSequenceClassification" in config["architectures"][0]


def test_save_copies_the_tokenizer_and_generation_config_of_an_lm_only(tmp_path, folder):
    byte_level(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    save(tiny.ours(folder), tmp_path / "lm", folder, torch.float32)
    save(reward_model(folder), tmp_path / "reward", folder, torch.float32)
    lm, reward = ({file.name for file in (tmp_path / name).iterdir()} for name in ("lm", "reward"))
    assert lm - reward == {"generation_config.json"} and not reward - lm
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "lm" / name).read_bytes() == (folder / name).read_bytes()


def test_a_saved_folder_names_no_code_of_the_folder_that_it_is_made_from(tmp_path, folder):
    """transformers would look for a file that is not there; the tokenizer's class is then the one that splits alike."""
    byte_level(folder)
    for name, edits in {
        "config.json": {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
        | {"tokenizer_class": "Own"},
    }.items():
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(content | edits))
    save(tiny.ours(folder), tmp_path / "out", folder, torch.float32)
    assert not any("auto_map" in file.read_text() for file in (tmp_path / "out").glob("*.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("2 + 2?")["input_ids"] == Tokenizer(folder).encode("2 + 2?")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# Invalid folders


def test_a_path_that_is_no_model_folder_is_refused_with_the_reason(tmp_path, folder):
    assert "no/such/model is not a folder" in load_error("no/such/model")
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json" in load_error(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in load_error(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json is not JSON"),
        ("[1]", "config.json holds a JSON list"),
        ("[" * 100_000, "config.json is not JSON"),
        ('{"model_type": [1]}', "config.json: model_type [1] is not supported"),
        (
            '{"model_type": "bert"}',
            "config.json: model_type 'bert' is not supported, only exaone, ",
        ),
        ('{"model_type": "llama"}', "config.json: the setting 'num_attention_heads' is missing"),
        ('{"model_type": "llama", "quantization_config": {"bits": 4}}', "config.json: quantization_config"),
        ('{"model_type": "gpt_oss", "quantization_config": {"bits": 4}}', "config.json: model_type 'gpt_oss'"),
        ('{"model_type": "llama", "hidden_act": "mish"}', "config.json: hidden_act 'mish'"),
    ],
)
def test_an_invalid_config_json_is_refused_with_the_reason(folder, text, message):
    (folder / "config.json").write_text(text)
    assert message in load_error(folder)


def test_pickled_weights_are_refused_with_a_command_to_convert_them(tmp_path, folder):
    hf_model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(hf_model.state_dict(), folder / "pytorch_model.bin")
    message = load_error(folder)
    assert "pickled weights" in message
    exec(re.search('python -c "(.*)"', message)[1])
    assert torch.equal(tiny.ours(tmp_path / "m-safetensors").norm.weight, hf_model.model.norm.weight)


def test_the_message_counts_wrong_tensors_and_names_the_first(folder):
    def spoil(tensors):
        for layer in range(2):
            for name in "qkv":
                del tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(48)
        tensors["model.layers.7.input_layernorm.weight"] = torch.zeros(32)
        tensors["model.visual"] = torch.zeros(1)
        tensors["model.embed_tokens.weight"] = torch.zeros(100, 32)
        tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)

    rewrite(folder, spoil)
    message = load_error(folder)
    for part in (
        "6 missing: model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight and 1 more;",
        "3 unknown: model.layers.0.mlp.up_proj.bias, model.layers.7.input_layernorm.weight, model.visual;",
        "1 of another shape: model.embed_tokens.weight (100, 32) instead of (99, 32);",
        "1 not of a floating-point dtype: model.norm.weight I8",
    ):
        assert part in message, message


def test_load_changes_no_parameter_if_a_tensor_is_wrong(folder):
    model = tiny.ours(folder)
    before = [p.clone() for p in model.parameters()]
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match="1 of another shape"):
        weights.load(model, folder)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


def test_a_language_model_needs_its_head_and_rejects_a_reward_model(tmp_path, folder):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "1 missing: lm_head.weight" in load_error(folder)
    for tied in (True, False):
        source = tiny.save_with(tiny.llama(tie_word_embeddings=tied), tmp_path / f"source {tied}")
        save(reward_model(source), tmp_path / f"reward {tied}", source, torch.float32)
        assert "holds a reward model (score.weight)" in load_error(tmp_path / f"reward {tied}")


def test_a_classifier_with_two_labels_is_not_a_reward_model(folder):
    rewrite(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 32)}))
    assert "score.weight has 2 outputs: name the one that is the reward, --reward_label 0 to 1" in load_error(
        folder, RewardModel
    )


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {"score.bias": (1,), "score.1.weight": (1, 32)},
            "1 unknown: score.1.weight; only a reward head of one linear",
        ),
        ({"score.0.weight": (32, 32), "score.2.weight": (1, 32)}, "2 unknown: score.0.weight, score.2.weight; only a"),
        ({"v_head.summary.0.weight": (32, 32)}, "1 unknown: v_head.summary.0.weight; only a reward head"),
        ({"score.weight": (1, 32), "my_head.weight": (1, 32)}, "1 unknown: my_head.weight"),
        ({"score.weight": (1, 32), "v_head.weight": (1, 32)}, "1 stored twice: score.weight and v_head.weight"),
        ({"lm_head.weight": (1, 32)}, "lm_head.weight (1, 32) instead of (99, 32)"),
    ],
)
def test_a_reward_head_of_another_kind_is_refused_by_tensor_name(folder, tensors, message):
    rewrite(folder, lambda stored: stored.update({name: torch.zeros(shape) for name, shape in tensors.items()}))
    assert message in load_error(folder, RewardModel)


@pytest.mark.parametrize("keep", [0, 5, 3000])
def test_the_message_names_a_truncated_file(folder, keep):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    assert "model.safetensors is not a whole safetensors file" in load_error(folder)


def test_the_message_names_a_git_lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    assert "model.safetensors is not a whole safetensors file" in load_error(folder)


def test_the_message_names_a_file_that_the_index_names_but_is_missing(tmp_path, folder):
    many = tmp_path / "many"
    tiny.save_with(AutoModelForCausalLM.from_pretrained(folder), many, max_shard_size="20KB")
    missing = sorted(many.glob("*.safetensors"))[1]
    shutil.move(missing, tmp_path)
    assert f"model.safetensors.index.json names {missing.name}, which the folder lacks" in load_error(many)
    for names, message in (
        ({"x": "../m/model.safetensors"}, "only files of the same folder"),
        ({"x": 3}, "of type string"),
    ):
        (many / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        assert message in load_error(many)
    (many / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json names no files" in load_error(many)


def test_a_head_that_differs_from_its_tied_embedding_is_refused(tmp_path):
    """transformers unties the two then; merged adapters leave such checkpoints."""
    folder = tiny.save_with(tiny.llama(tie_word_embeddings=True), tmp_path / "m")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][7, 3] += 1

    rewrite(folder, add)
    assert "lm_head.weight differs from model.embed_tokens.weight, although config.json ties" in load_error(folder)
    reward_model(folder)  # which has no use for a language model's head


def test_weights_are_on_the_disk_before_their_folder_has_its_name(tmp_path, folder, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def recording_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(f"-> {Path(new).name}"), replace(old, new)))
    save(tiny.ours(folder), tmp_path / "out", folder, torch.float32)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    named = events.index("-> out")
    assert written | {".out.writing"} <= set(events[:named]) and events[named + 1] == tmp_path.name
