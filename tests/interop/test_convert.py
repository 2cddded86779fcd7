"""`mhc convert`: files and folders of safetensors, in both directions, and what is left on disk
when it fails.
"""

from __future__ import annotations

import json
import struct
import sys

import pytest
import torch
from helpers.native_states import NAMES, native_state, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mhc_compile import cli, interop
from mhc_compile.interop import safetensors_io
from mhc_compile.interop.layouts import LAYOUTS


@pytest.fixture
def mhc(monkeypatch, capsys):
    """Runs the command; gives the exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mhc", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, " ".join(captured.err.split())

    return run


@pytest.fixture
def native(tmp_path):
    """A file of GLM-5-next with a tensor in a dtype that is only copied."""
    state = native_state("glm5-next", layers=2) | {
        "model.layers.0.mlp.scale_inv": torch.ones(3).to(torch.float8_e4m3fn)
    }
    save_file(state, tmp_path / "native.safetensors", metadata={"format": "pt", "made": "here"})
    return tmp_path / "native.safetensors"


@pytest.fixture
def sharded(tmp_path):
    """A folder of Qwen4-Exp in three files; one tensor of the result comes from two of them."""
    state = native_state("qwen4-exp", layers=2)
    folder = tmp_path / "native"
    folder.mkdir()
    names = list(state)
    shards = {f"model-{i + 1}-of-3.safetensors": names[i::3] for i in range(3)}
    for shard, entries in shards.items():
        save_file({name: state[name] for name in entries}, folder / shard, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": 1, "made": "here"},
        "weight_map": {name: s for s, e in shards.items() for name in e},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "qwen4_exp_text"}')
    (folder / "assets").mkdir()
    return folder


def all_of(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_file_there_and_back(mhc, native, tmp_path):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    code, out, _ = mhc(native, ours, "--from", "glm5-next")
    assert code == 0
    assert same(load_file(ours), interop.from_native(load_file(native), "glm5-next"))
    assert metadata_of(ours) == {"format": "pt", "made": "here", "mhc_preset": "glm5-next"}
    assert "layers.0.attn_hc.fn" in out
    assert "transposed, residual i↔j" in " ".join(out.split())
    assert "12 entries converted, 7 copied" in out
    assert mhc(ours, back, "--to", "glm5-next")[0] == 0
    assert same(load_file(back), load_file(native))
    assert metadata_of(back) == {"format": "pt", "made": "here"}


def test_a_folder_of_several_files_there_and_back(mhc, sharded, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    code, out, _ = mhc(sharded, ours, "--from", "qwen4-exp", "--json")
    report = json.loads(out)
    assert (code, report["to"], report["copied"], report["left"]) == (0, "mhc", ["config.json"], ["assets"])
    wanted = interop.from_native(native_state_of(sharded), "qwen4-exp")
    assert same(all_of(ours), wanted)
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == wanted.keys()
    assert all(name in load_file(ours / file) for name, file in index["weight_map"].items())
    assert index["metadata"] == {"made": "here", "total_size": sum(v.nbytes for v in wanted.values())}
    assert (ours / "config.json").read_text() == (sharded / "config.json").read_text()
    assert mhc(ours, back, "--to", "qwen4-exp")[0] == 0
    assert same(all_of(back), native_state_of(sharded))


def native_state_of(folder):
    return all_of(folder)


def test_a_spelling_and_other_branches(mhc, tmp_path):
    state = native_state("deepseek-v4", "published", layers=2)
    save_file(state, tmp_path / "a.safetensors")
    assert (
        mhc(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--from", "deepseek-v4", "--branch", "x=attn")[0]
        == 0
    )
    assert "model.layers.0.mhc.x.phi" in load_file(tmp_path / "b.safetensors")
    arguments = ("--to", "deepseek-v4", "--spelling", "published", "--branch", "x=attn")
    assert mhc(tmp_path / "b.safetensors", tmp_path / "c.safetensors", *arguments)[0] == 0
    assert same(load_file(tmp_path / "c.safetensors"), state)


def test_only_one_tensor_is_read_at_a_time(native, tmp_path, monkeypatch):
    # Tensors that stay are never made into tensors at all, and those that change are gone before
    # the next one.
    alive, most = [], []
    read = safetensors_io.read

    def counted(stored):
        value = read(stored)
        import weakref

        alive.append(weakref.ref(value))
        most.append(sum(ref() is not None for ref in alive))
        return value

    monkeypatch.setattr("mhc_compile.interop.convert.read", counted)
    from mhc_compile.interop.convert import convert

    convert(native, tmp_path / "ours.safetensors", "glm5-next", native=False)
    assert len(most) == 12
    assert max(most) == 1


def test_an_existing_result_is_kept_unless_forced(mhc, native, tmp_path):
    ours = tmp_path / "ours.safetensors"
    ours.write_text("mine")
    code, _, err = mhc(native, ours, "--from", "glm5-next")
    assert (code, ours.read_text()) == (1, "mine")
    assert "is there already; --force" in err
    assert mhc(native, ours, "--from", "glm5-next", "--force")[0] == 0
    assert len(load_file(ours)) == 19


def test_a_forced_folder_is_replaced_whole_and_only_if_it_is_a_checkpoint(mhc, sharded, tmp_path):
    ours, home = tmp_path / "ours", tmp_path / "home"
    ours.mkdir()
    save_file({"old": torch.ones(1)}, ours / "old.safetensors")
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    assert mhc(sharded, ours, "--from", "qwen4-exp", "--force")[0] == 0
    assert not (ours / "old.safetensors").exists()
    code, _, err = mhc(sharded, home, "--from", "qwen4-exp", "--force")
    assert (code, (home / "letters.txt").read_text()) == (1, "dear")
    assert "holds more than a checkpoint, or none" in err


def test_after_a_failure_nothing_is_there(mhc, sharded, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    write, calls = safetensors_io.write, []

    def failing(path, tensors, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(path, tensors, metadata)

    monkeypatch.setattr("mhc_compile.interop.convert.write", failing)
    code, _, err = mhc(sharded, tmp_path / "ours", "--from", "qwen4-exp")
    assert code == 1
    assert "No space left on device" in err
    assert len(calls) == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "give either --from PRESET"),
        (("--from", "hy-v4", "--to", "hy-v4"), 2, "give either --from PRESET"),
        (("--from", "glm5-next", "--spelling", "saved"), 2, "--spelling is for --to"),
        (("--from", "glm5-next", "--branch", "attn"), 2, "expected OURS=THEIRS"),
        (("--from", "glm"), 2, "did you mean 'glm5-next'"),
        (("--from", "deepseek-v4"), 1, "are those of 'glm5-next'"),
        (("--to", "glm5-next"), 1, "in a native layout already"),
    ],
)
def test_wrong_input_is_one_paragraph(mhc, native, tmp_path, arguments, code, words):
    got, _, err = mhc(native, tmp_path / "ours.safetensors", *arguments)
    assert (got, words in err) == (code, True), err
    assert not (tmp_path / "ours.safetensors").exists()


def test_a_file_of_another_preset_is_known_by_its_mark(mhc, native, tmp_path):
    ours = tmp_path / "ours.safetensors"
    mhc(native, ours, "--from", "glm5-next")
    code, _, err = mhc(ours, tmp_path / "x.safetensors", "--to", "deepseek-v4")
    assert code == 1
    assert "was converted from 'glm5-next'" in err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is shorter than its header says"),
        (lambda path: path.write_bytes(b"PK\3\4 a zip of torch.save"), "is no safetensors file"),
        (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"[12]"), "is no safetensors file"),
        (lambda path: path.write_bytes(b""), "is no safetensors file"),
        (lambda path: path.unlink(), "there is no file or folder"),
        (
            lambda path: save_file({"model.layers.0.attn_hc.fn": torch.ones(24, 24, dtype=torch.int8)}, path),
            "has fn and no base, scale",
        ),
    ],
)
def test_damaged_files_are_rejected(mhc, native, tmp_path, spoil, words):
    spoil(native)
    code, _, err = mhc(native, tmp_path / "ours.safetensors", "--from", "glm5-next")
    assert code in (1, 2)
    assert words in err
    assert not (tmp_path / "ours.safetensors").exists()


def test_parameters_of_integer_dtype_are_rejected(mhc, native, tmp_path):
    state = {name: v.to(torch.int8) if "_hc." in name else v for name, v in load_file(native).items()}
    save_file(state, native)
    code, _, err = mhc(native, tmp_path / "ours.safetensors", "--from", "glm5-next")
    assert (code, "dtype I8; expected one of F64" in err) == (1, True)


def test_an_index_that_does_not_belong_to_its_files_is_rejected(mhc, sharded, tmp_path):
    (sharded / "model-2-of-3.safetensors").write_bytes((sharded / "model-1-of-3.safetensors").read_bytes())
    code, _, err = mhc(sharded, tmp_path / "ours", "--from", "qwen4-exp")
    assert (code, "index and files do not belong together" in err) == (1, True)
    (sharded / "model.safetensors.index.json").unlink()
    code, _, err = mhc(sharded, tmp_path / "ours", "--from", "qwen4-exp")
    assert (code, "does not hold one checkpoint" in err) == (1, True)


@pytest.mark.parametrize("place", ["native", "native/ours", "elsewhere/ours", "native.safetensors"])
def test_results_need_a_place_of_their_own(mhc, sharded, tmp_path, place):
    if place == "native.safetensors":
        save_file({"a": torch.ones(1)}, tmp_path / place)
    code, _, err = mhc(sharded, tmp_path / place, "--from", "qwen4-exp", "--force")
    assert code == 1
    assert any(words in err for words in ("choose another place", "there is no folder", "choose another name"))
    assert len(all_of(sharded)) == len(native_state("qwen4-exp", layers=2))


def test_every_kind_of_names_has_a_preset_with_a_layout():
    assert {preset for preset, _ in NAMES} == set(LAYOUTS)
    for layout in LAYOUTS.values():
        assert {spelling for preset, spelling in NAMES if preset == layout.preset} == {s.name for s in layout.spellings}
