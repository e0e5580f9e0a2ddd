"""Which files make an image, and where a model's folder is."""

import json
import os
from pathlib import Path

import pytest
from tests.worker_client.image.files import (
    make_folder,
    make_folder_with_draft,
    make_hf_cache,
    make_sharded_folder,
)

from hotweights.worker_client.image.errors import BadImage, ModelNotFound
from hotweights.worker_client.image.folder import INDEX, belongs, is_plain_name, list_files, locate, resolve_model


def names(folder: Path, *, include_code: bool = False) -> list[str]:
    return [file.name for file in list_files(folder, include_code=include_code)]


def test_weights_and_configuration_make_the_image_and_pickles_code_and_hidden_files_do_not(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    for stray in ("pytorch_model.bin", "x.pt", "x.pth", "x.pkl", "modeling.py", ".hidden.json", "README.md", "x.gguf"):
        (folder / stray).write_text("x")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "original").mkdir()
    for kept in ("tokenizer.model", "chat_template.jinja", "generation_config.json", "qwen.tiktoken"):
        (folder / kept).write_text("x")
    assert names(folder) == [
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "qwen.tiktoken",
        "tokenizer.model",
    ]
    assert [file.name for file in list_files(folder) if file.weights] == ["model.safetensors"]


def test_code_rides_along_only_when_asked_for(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "modeling.py").write_text("x")
    assert "modeling.py" not in names(folder)
    assert "modeling.py" in names(folder, include_code=True)


def test_with_an_index_only_the_weights_it_names_count(tmp_path: Path) -> None:
    folder = make_sharded_folder(tmp_path / "model")
    (folder / "consolidated.safetensors").write_bytes(b"not even a header")
    assert names(folder) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    ]


def test_an_index_that_names_a_missing_file_is_refused_by_both_names(tmp_path: Path) -> None:
    folder = make_sharded_folder(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadImage, match=r"index.json: names 'model-00002-of-00002.safetensors', which is not"):
        list_files(folder)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "no plain"),
        ('{"weight_map": {"a": "/etc/a.safetensors"}}', "no plain"),
        ('{"weight_map": {"a": "a.bin"}}', "no plain"),
        ('{"weight_map": {"a": 1}}', "no plain"),
        (r'{"weight_map": {"a": "\ud800.safetensors"}}', "no plain"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str, problem: str) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / INDEX).write_text(index)
    with pytest.raises(BadImage, match=problem) as caught:
        list_files(folder)
    assert caught.value.file == INDEX


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("x")
    with pytest.raises(BadImage, match="no tensor at all"):
        list_files(tmp_path)


def test_a_link_within_the_folder_counts_as_the_file_it_leads_to(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "tokenizer.json").symlink_to("config.json")
    assert locate(folder, "tokenizer.json") == folder / "config.json"
    assert "tokenizer.json" in names(folder)


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside.json", "../blobs/x.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    folder = make_folder(tmp_path / "model")
    (tmp_path / "outside.json").write_text("{}")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(target)
    with pytest.raises(BadImage, match=r"tokenizer.json: is a link out of the folder"):
        list_files(folder)


def test_a_draft_inside_is_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    folder = make_sharded_folder(tmp_path / "model")
    make_sharded_folder(folder / "draft")
    (folder / "draft" / "left_out.safetensors").write_bytes(b"")  # the draft's index does not name it
    own = names(folder)
    assert own == sorted(own)
    assert [name for name in own if name.startswith("draft/")] == [
        "draft/model-00001-of-00002.safetensors",
        "draft/model-00002-of-00002.safetensors",
        "draft/model.safetensors.index.json",
    ]
    assert locate(folder, "draft/model-00001-of-00002.safetensors").parent == folder / "draft"


def test_a_folder_that_happens_to_be_called_draft_is_none(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    before = names(folder)
    (folder / "draft").mkdir()
    (folder / "draft" / "notes.txt").write_text("to do")
    assert names(folder) == before


def test_a_draft_alone_is_no_model(tmp_path: Path) -> None:
    make_folder(tmp_path / "model" / "draft")
    with pytest.raises(BadImage, match="no tensor at all"):
        list_files(tmp_path / "model")


def test_a_draft_shares_files_with_its_target_and_with_nobody_else(tmp_path: Path) -> None:
    folder = make_folder_with_draft(tmp_path / "model")
    (folder / "draft" / "tokenizer.json").symlink_to("../config.json")
    assert locate(folder, "draft/tokenizer.json") == folder / "config.json"
    (folder / "draft" / "tokenizer.json").unlink()
    (folder / "draft" / "tokenizer.json").symlink_to("../../outside.json")
    (tmp_path / "outside.json").write_text("{}")
    with pytest.raises(BadImage, match=r"draft/tokenizer.json: is a link out of the folder"):
        list_files(folder)


def test_a_draft_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    make_folder(tmp_path / "another")
    (folder / "draft").symlink_to(tmp_path / "another")
    with pytest.raises(BadImage, match=r"draft/.*: is a link out of the folder"):
        list_files(folder)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    for name, make in (
        ("folder.json", lambda path: path.mkdir()),
        ("pipe.json", os.mkfifo),
        ("loop.json", lambda path: path.symlink_to("loop.json")),
        ("broken.json", lambda path: path.symlink_to("nowhere.json")),
    ):
        make(folder / name)
        with pytest.raises(BadImage) as caught:
            locate(folder, name)
        assert caught.value.file == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", ".a", "a\0b", "a\nb", "x" * 256, "\ud800"]
)
def test_only_plain_names_are_plain(name: str) -> None:
    assert not is_plain_name(name)
    assert not belongs(name + ".json", include_code=True) or not name


def test_the_hugging_face_cache_is_a_folder_of_links_that_works(tmp_path: Path) -> None:
    snapshot = make_hf_cache(tmp_path)
    files = {file.name: file for file in list_files(snapshot)}
    assert files["model.safetensors"].weights
    assert files["config.json"].path.parent == snapshot.parent.parent / "blobs"
    assert files["config.json"].path.read_text() == '{"hidden_size": 40}'


def test_a_link_of_the_cache_into_another_models_blobs_is_refused(tmp_path: Path) -> None:
    snapshot = make_hf_cache(tmp_path)
    other = make_hf_cache(tmp_path, "org/other")
    (snapshot / "stolen.json").symlink_to((other / "config.json").resolve())
    with pytest.raises(BadImage, match="out of the folder"):
        list_files(snapshot)


def test_a_model_id_is_found_in_the_local_cache_by_branch_and_by_commit(tmp_path: Path) -> None:
    snapshot = make_hf_cache(tmp_path, "org/small", "c0ffee")
    assert resolve_model("org/small", tmp_path) == snapshot
    assert resolve_model("org/small", tmp_path, revision="c0ffee") == snapshot


def test_the_folder_of_an_id_is_the_one_that_huggingface_hub_finds(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    make_hf_cache(tmp_path, "org/small")
    found = hub.snapshot_download("org/small", cache_dir=tmp_path, local_files_only=True)
    assert Path(found) == resolve_model("org/small", tmp_path)


def test_a_folder_is_taken_before_an_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf_cache(tmp_path / "cache", "org/small")
    folder = make_folder(tmp_path / "org" / "small")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/small", tmp_path / "cache") == folder


@pytest.mark.parametrize(
    ("name", "revision", "problem"),
    [
        ("org/absent", "main", "neither a folder nor in the local Hugging Face cache"),
        ("org/small", "v7", "revision 'v7' is not in the local"),
        ("org/small", "../../../etc", "is no revision"),
        ("/no/such/folder", "main", "no such folder"),
        ("../x/y", "main", "no such folder"),
        ("", "main", "no such folder"),
    ],
)
def test_a_model_that_is_not_there_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, revision: str, problem: str
) -> None:
    make_hf_cache(tmp_path)
    monkeypatch.chdir(tmp_path / "models--org--small" / "refs")
    with pytest.raises(ModelNotFound, match=problem) as caught:
        resolve_model(name, tmp_path, revision=revision)
    assert caught.value.name == name
    assert "looked in" in str(caught.value)


def test_an_index_with_a_tensor_count_of_thousands_is_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    weight_map = {f"layer.{n}": "model.safetensors" for n in range(5000)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert INDEX in names(folder)
