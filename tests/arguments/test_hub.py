"""Uploads, to a stand-in that keeps what it was given."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainerCallback, TrainerControl, TrainerState

from hflit import HFTrainer
from hflit.arguments import parse
from hflit.loop.hub import HubUpload
from tests.arguments.conftest import SETTINGS

TOKEN = "hf_secret"


@pytest.fixture
def hub(monkeypatch):
    """The calls that would go to the Hub; jobs in the background end when `hub.finish` says."""
    stand_in = SimpleNamespace(repositories=[], uploads=[], jobs=[], is_slow=False)

    def create_repo(name, **options):
        stand_in.repositories.append((name, options))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(*, folder_path, ignore_patterns, run_as_future=False, **options):
        names = (path.name for path in Path(folder_path).iterdir())
        files = sorted(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        stand_in.uploads.append({"folder": Path(folder_path).name, "files": files, **options})
        job = Future()
        if not stand_in.is_slow:
            job.set_result(None)
        stand_in.jobs.append(job)
        return job if run_as_future else None

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return stand_in


def test_run_ends_on_the_hub(mine, hub):
    mine(
        output_dir="out",
        push_to_hub=True,
        hub_token=TOKEN,
        hub_private_repo=True,
        hub_model_id="me/bert",
        hub_revision="trial",
    )
    (made,) = hub.repositories
    assert made == ("me/bert", {"token": TOKEN, "private": True, "exist_ok": True})
    (upload,) = hub.uploads
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(upload["files"])
    assert (upload["repo_id"], upload["revision"], upload["token"]) == ("me/bert", "trial", TOKEN)


def test_repository_is_named_after_the_folder(mine, hub):
    mine(output_dir="runs/birds", push_to_hub=True, max_steps=1)
    assert hub.repositories[0][0] == "birds"
    assert hub.uploads[0]["repo_id"] == "me/birds"


def test_token_is_written_nowhere(base, rows, hub, tmp_path, capfd, caplog, monkeypatch):
    class Look(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(f"{args} {state} {logs} {args.to_json_string()}")

    seen = []
    given = {
        "output_dir": "out",
        "push_to_hub": True,
        "hub_token": TOKEN,
        "report_to": "tensorboard",
    }
    HFTrainer()(base(), *rows, **SETTINGS, **given, callbacks=[Look()])
    assert hub.uploads[0]["token"] == TOKEN
    assert not any(TOKEN in text for text in seen)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]

    monkeypatch.setattr(huggingface_hub, "upload_folder", fail)
    with pytest.raises(OSError, match="no way") as caught:
        HFTrainer()(base(), *rows, **SETTINGS, **given)
    captured = capfd.readouterr()
    assert TOKEN not in str(caught.value) + captured.out + captured.err + caplog.text


def fail(**_):
    raise OSError("no way to the Hub")


@pytest.fixture
def saved(tmp_path, hub):
    """Make checkpoints as a run does, and tell the callback."""

    def save(upload, args, step):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        names = ("optimizer.pt", "rng_state.pth", "trainer_state.json", "complete.json")
        for name in ("model.safetensors", *names):
            (folder / name).write_text(f"{step}")
        (folder.parent / f".checkpoint-{step + 1}.7.part").mkdir()  # being written
        (folder / "optimizer").mkdir()  # what several processes wrote
        (folder / "optimizer" / "0.distcp").write_text(f"{step}")
        upload.on_save(args, TrainerState(global_step=step), TrainerControl())

    return save


def started(**given):
    args, _ = parse({"output_dir": "out", "push_to_hub": True, "hub_model_id": "me/bert", **given})
    upload = HubUpload()
    upload.on_init_end(args, TrainerState(), TrainerControl())
    return upload, args


@pytest.mark.parametrize(
    ("strategy", "folders", "places"),
    [
        ("end", [], []),
        ("every_save", ["out"], [None]),
        ("checkpoint", ["out", "checkpoint-3"], [None, "last-checkpoint"]),
        ("all_checkpoints", ["out", "checkpoint-3"], [None, "checkpoint-3"]),
    ],
)
def test_strategy_decides_what_is_uploaded(strategy, folders, places, hub, saved):
    upload, args = started(hub_strategy=strategy)
    saved(upload, args, 3)
    assert [each["folder"] for each in hub.uploads] == folders
    assert [each.get("path_in_repo") for each in hub.uploads] == places
    if folders:
        assert hub.uploads[0]["files"] == ["model.safetensors"]
        assert hub.uploads[0]["commit_message"] == "Training in progress, step 3"
    if len(folders) == 2:
        assert "optimizer.pt" in hub.uploads[1]["files"]
    upload.finish(args)
    assert hub.uploads[-1]["commit_message"] == "End of training"


@pytest.mark.parametrize(("always", "expected"), [(False, 1), (True, 2)])
def test_uploads_wait_for_each_other_or_not(always, expected, hub, saved, caplog):
    upload, args = started(hub_always_push=always)
    hub.is_slow = True
    saved(upload, args, 1)
    saved(upload, args, 2)
    assert len(hub.uploads) == expected
    hub.jobs[0].set_exception(OSError(TOKEN))
    for job in hub.jobs[1:]:
        job.set_result(None)
    saved(upload, args, 3)  # the way is free
    assert len(hub.uploads) == expected + 1
    hub.jobs[-1].set_result(None)
    upload.finish(args)
    assert "An upload to the Hub failed: OSError" in caplog.text
    assert TOKEN not in caplog.text


def test_a_full_disk_leaves_out_an_upload_and_no_update(hub, saved, caplog, monkeypatch):
    """Once the run ended there."""
    upload, args = started(hub_strategy="every_save")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    saved(upload, args, 3)
    assert hub.uploads == []
    assert "checkpoint-3 is not uploaded: it cannot be copied" in caplog.text


def test_only_the_first_process_uploads(hub, saved):
    args, _ = parse({"output_dir": "out", "push_to_hub": True})
    upload = HubUpload()
    upload.on_init_end(args, TrainerState(is_world_process_zero=False), TrainerControl())
    saved(upload, args, 1)
    upload.finish(args)
    assert hub.repositories == hub.uploads == []
