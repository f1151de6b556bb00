"""Who may see the page."""

import os
import time
from pathlib import Path

import pytest

from hi_diffusers.commands import gradio_demo
from hi_diffusers.demo.serving import ServingSettings, is_loopback, read_auth, sweep


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone_needs_no_password(host):
    assert is_loopback(host)
    assert ServingSettings(host=host).auth == ()


@pytest.mark.parametrize("settings", [{"host": "0.0.0.0"}, {"host": "::"}, {"host": "10.0.0.1"}, {"share": True}])
def test_a_public_page_needs_a_password_or_a_word(settings):
    with pytest.raises(ValueError, match="give --auth, or --no_auth"):
        ServingSettings(**settings)
    assert ServingSettings(**settings, no_auth=True)
    assert ServingSettings(**settings, auth=(("a", "b"),))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"port": 0}, "port"),
        ({"port": 70_000}, "port"),
        ({"max_queue": 0}, "max_queue"),
        ({"root_path": "x"}, "root_path"),
        ({"ssl_certfile": Path("a")}, "ssl_certfile"),
        ({"ssl_certfile": Path("absent"), "ssl_keyfile": Path("absent")}, "ssl_certfile"),
        ({"auth": (("a", "b"),), "no_auth": True}, "no_auth"),
    ],
)
def test_a_setting_out_of_its_domain_is_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        ServingSettings(**settings)


def test_passwords_come_from_a_pair_a_file_or_the_environment(tmp_path):
    file = tmp_path / "users"
    file.write_text("ann:one\n\nbob:two:three\n", encoding="utf-8")
    assert read_auth(None) == ()
    assert read_auth("ann:one") == (("ann", "one"),)
    assert read_auth(str(file)) == (("ann", "one"), ("bob", "two:three"))
    assert read_auth("environment", {"HIDREAM_DEMO_AUTH": "ann:one"}) == (("ann", "one"),)
    assert read_auth("environment", {"HIDREAM_DEMO_AUTH": str(file)}) == read_auth(str(file))


@pytest.mark.parametrize("text", ["ann", "ann:", ":one", "environment"])
def test_bad_passwords_are_refused_and_not_repeated(text):
    with pytest.raises(ValueError, match="auth") as refusal:
        read_auth(text, {"HIDREAM_DEMO_AUTH": ""})
    assert "ann" not in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0 lets others use the page"),
        (["--share"], "share lets others use the page"),
        (["--auth", "ann"], "auth must be"),
        (["--port", "99999"], "--port must be"),
        (["--max_steps", "0"], "--max_steps"),
        (["--max_images", "0"], "--max_images"),
        (["--max_prompt_chars", "0"], "--max_prompt_chars"),
        (["--safety_threshold", "0.3"], "safety_threshold has no effect"),
        (["--model_path", "/absent"], "--model_path must be a folder"),
        (["--device", "cuda:9"], "device"),
    ],
)
def test_bad_flags_are_one_line_before_anything_is_served(flags, named, capsys, monkeypatch):
    monkeypatch.setattr("hi_diffusers.demo.serving.serve", lambda *_: pytest.fail("the page was served"))
    assert gradio_demo.main(flags) == 2
    said = capsys.readouterr().err.strip()
    assert named in said
    assert said.count("\n") == 0


def test_files_are_swept_by_age_wherever_they_came_from(tmp_path):
    """An upload that its visitor broke off is a file that gradio does not know of."""
    old, new, broken_off = tmp_path / "a" / "old.png", tmp_path / "b" / "new.png", tmp_path / "tmp1234"
    for path in (old, new, broken_off):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in (old, old.parent, broken_off):
        os.utime(path, (time.time() - 5000,) * 2)
    sweep(tmp_path, 3600)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [new]
    sweep(tmp_path, 3600)
