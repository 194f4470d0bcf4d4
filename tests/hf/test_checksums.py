"""rm.hf.checksums: as sha256sum has them, and compared when weights are loaded (all files: tests/test_bit_rot.py)."""

import subprocess

import pytest
import torch

from rm.distributed import process_group as dist
from rm.hf import checksums, weights
from rm.hf.saving import replaced_folder, save
from tests import tiny


def test_a_changed_byte_is_found_by_the_checksums_of_the_folder(tmp_path):
    folder = tiny.save_with(tiny.llama(), tmp_path / "m")
    with dist.session(seed=0):
        save(tiny.ours(folder), tmp_path / "out", folder, torch.float32)
    weights.check_whole(tmp_path / "out")
    subprocess.run(["sha256sum", "--check", "--status", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors has changed since it was written, as SHA256SUMS says"):
        weights.check_whole(tmp_path / "out")
    with pytest.raises(ValueError, match="model.safetensors has changed since it was written, as SHA256SUMS says"):
        tiny.ours(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"a" * 64 + b" model.safetensors\n", b"a" * 64 + b"  a\nb"])
def test_damaged_checksums_are_refused(content, tmp_path):
    (tmp_path / checksums.FILE).write_bytes(content)
    with pytest.raises(ValueError, match="SHA256SUMS is damaged: copy it again, or delete it"):
        checksums.check(tmp_path)


def test_a_model_that_has_lost_its_config_is_replaced_and_what_was_none_is_not(tmp_path):
    for name in ("model", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("config.json" if name == "model" else "pairs.json")).write_text("{}")
        checksums.write(tmp_path / name)
    (tmp_path / "model" / "config.json").unlink()
    with dist.session(seed=0), replaced_folder(tmp_path / "model") as writing:
        (writing / "new").touch()
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["new"]
    with pytest.raises(ValueError, match="data exists and is not a model"), replaced_folder(tmp_path / "data"):
        pass
