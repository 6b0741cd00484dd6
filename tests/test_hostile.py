"""Input that means harm: too large, too deep, with paths out of its folder, with code, with what never ends."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from model import CheckpointError, load_hf_model
from pipeline.config import ROOMS
from report.summary import show_figures
from runtime import chat, tokenizer_files
from runtime import tokenizer as tokenizers_
from runtime.artifact import ArtifactError, load_manifest, read_manifest
from runtime.errors import BadArtifactError, InputError, UsageError, one_line
from runtime.limits import LimitError, limited
from runtime.program import ProgramError
from runtime.text import open_text_artifact
from tests.checkpoints import BUNDLED, GOLDEN, ROOT
from tests.resealing import reseal
from validation.child import run_child
from validation.figure import Figure
from validation.reference import ReferenceError, Sequence, load_reference
from validation.replay import replay
from validation.trace import trace
from validation.trace_places import TraceError

Pipeline = Callable[..., tuple[int, str, str]]
TERABYTES = (2**42).to_bytes(8, "little")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "mqa4-sharded", folder, ignore=shutil.ignore_patterns("cases.*", "generation.*"))
    return folder


# ---- Sizes, before memory is taken ----


def test_a_header_of_terabytes(checkpoint: Path, artifact: Path) -> None:
    shard = next(iter(sorted(checkpoint.glob("*.safetensors"))))
    for file in (shard, artifact / "reference.safetensors"):
        with file.open("r+b") as opened:
            opened.write(TERABYTES)
            opened.truncate(2**43)  # as large as it says, and takes no disk
    with pytest.raises(CheckpointError, match=f"{shard.name}.*a header of {2**42} bytes"):
        load_hf_model(checkpoint)
    with pytest.raises(ReferenceError, match=f"a header of {2**42} bytes"):
        load_reference(artifact / "reference.safetensors")


def test_a_tensor_whose_name_is_a_million_parts(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "gqa2", tmp_path / "gqa2")
    file = tmp_path / "gqa2" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors | {"a." * 2**20: torch.ones(1)}, file)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"1 wrong tensor\(s\): surplus: a\.a\.") as raised:
        load_hf_model(tmp_path / "gqa2")
    assert len(str(raised.value)) < 500
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "manifest.json"])
def test_json_of_a_gigabyte(checkpoint: Path, artifact: Path, name: str) -> None:
    folder = artifact if name == "manifest.json" else checkpoint
    with (folder / name).open("r+b") as opened:
        opened.truncate(2**30)
    with pytest.raises((CheckpointError, ArtifactError), match=f"{name}.* {2**30} bytes"):
        load_manifest(folder) if folder == artifact else load_hf_model(folder)


def test_a_tokenizer_of_millions_of_lists(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("[" + "[]," * tokenizer_files.MAX_NESTED + "[]]")
    with pytest.raises(InputError, match="lists and objects"):
        tokenizers_.load_tokenizer(tmp_path)


# ---- Paths ----


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "x.safetensors\0"])
def test_an_index_that_leads_out(checkpoint: Path, name: str) -> None:
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is not a safetensors file of this folder|which is not there"):
        load_hf_model(checkpoint)


def test_links_of_a_checkpoint_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    """Its owner made them: each file may lie elsewhere, and so may what the folder's own name stands for."""
    elsewhere, linked = tmp_path / "elsewhere", tmp_path / "linked"
    elsewhere.mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        target = elsewhere / str(number)  # as in the hub's cache, where a file's name is its hash
        file.rename(target)
        file.symlink_to(target if number % 2 else f"../elsewhere/{number}")
    linked.symlink_to(checkpoint)
    assert load_hf_model(checkpoint)[1] == load_hf_model(linked)[1] == "Dream"


def test_a_snapshot_of_the_hubs_cache_loads(checkpoint: Path, tmp_path: Path) -> None:
    """And a folder of links into it, links to links."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "main", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    checkpoint.rename(blobs)
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        (mine / file.name).symlink_to(snapshot / file.name)
    assert load_hf_model(snapshot)[1] == load_hf_model(mine)[1] == "Dream"


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "generation_config.json", SHARD]
)
def test_a_link_of_a_checkpoint_that_leads_nowhere(checkpoint: Path, name: str) -> None:
    """Nor is a tokenizer that is such a link taken for none."""
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to("../blobs/absent")
    with pytest.raises(CheckpointError, match=rf"{name}: a link to \.\./blobs/absent, which is not there"):
        load_hf_model(checkpoint)
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to("second")
    (checkpoint / "second").symlink_to(name)
    with pytest.raises(CheckpointError, match=f"{name}: a link to second, and from there in a circle"):
        load_hf_model(checkpoint)


def test_a_folder_that_is_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "absent").symlink_to("nothing")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(CheckpointError, match="absent: a link to nothing, which is not there"):
        load_hf_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="circle: a link to circle, and from there in a circle"):
        load_hf_model(tmp_path / "circle")


def test_an_artifact_with_a_link(artifact: Path, tmp_path: Path) -> None:
    (artifact / "model.pte").rename(tmp_path / "elsewhere.pte")
    (artifact / "model.pte").symlink_to(tmp_path / "elsewhere.pte")
    with pytest.raises(ArtifactError, match=r"model.pte: a link"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    "name", ["manifest.json", "model.pte", "reference.safetensors", "provenance.json", "provenance.dsse.json"]
)
def test_what_is_no_file_is_not_waited_for(artifact: Path, pipeline: Pipeline, name: str) -> None:
    (artifact / name).unlink(missing_ok=True)
    os.mkfifo(artifact / name)
    code, _, err = pipeline("verify", f"artifact={artifact}")
    assert (code, err.count("\n"), name in err) == (6, 1, True), err


@pytest.mark.parametrize("name", ["", "manifest.json", "model.pte", "provenance.json"])
def test_what_may_not_be_read(artifact: Path, name: str) -> None:
    shutil.copyfile(BUNDLED / "tokenizer.json", artifact / "tokenizer.json")
    for parent in artifact.parents:
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o711)
    (artifact / name).chmod(0)
    with pytest.raises(ArtifactError, match=r"cannot be read|not a manifest: PermissionError"):
        limited(30, 2**30, _as_nobody, read_manifest, artifact)
    if name != "provenance.json":
        with pytest.raises(BadArtifactError, match=f"{name}: cannot be read|not a manifest: PermissionError"):
            limited(30, 2**30, _as_nobody, open_text_artifact, artifact)
    (artifact / name).chmod(0o755)


def _as_nobody(work: Callable[[Path], object], folder: Path) -> None:
    if os.geteuid() == 0:  # who may read everything
        os.seteuid(65534)
    work(folder)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "..", ".", "", "a/b", "model.pte/", "MODEL.pte", "x" * 300, "\0", "\ud800"],
)
def test_a_manifest_that_names_other_places(artifact: Path, pipeline: Pipeline, name: str) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "", "bytes": 0}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    reseal(artifact)
    code, _, err = pipeline("validate", f"artifact={artifact}")
    assert (code, err.count("\n")) == (6, 1), err


@pytest.mark.parametrize(
    ("command", "part", "change"),
    [
        ("bench", "export", {"max_seq_len": float("inf")}),
        ("compare", "delegation", {"delegates": 10**400}),
        ("inspect", "sizes", {"program": 10**400}),
    ],
)
def test_a_number_that_is_too_large(
    artifact: Path, pipeline: Pipeline, command: str, part: str, change: dict[str, float]
) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest[part] |= change
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    reseal(artifact)
    code, out, err = pipeline(command, str(artifact) if command == "compare" else f"artifact={artifact}")
    assert (code, out, err.count("\n")) == (6, "", 1), err


# ---- Code ----


@pytest.mark.parametrize("part", ["task", "recipe", "export", "validation"])
@pytest.mark.parametrize("change", [{"name": "${oc.env:HOME}"}, {"_target_": "os.system"}])
def test_a_manifest_that_asks_for_more(artifact: Path, pipeline: Pipeline, part: str, change: dict[str, str]) -> None:
    """Neither the environment nor a class of its choice: not even with the checkpoint, when it is a configuration."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest[part] |= change
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    reseal(artifact)
    code, _, err = pipeline("validate", f"artifact={artifact}", f"checkpoint={GOLDEN / 'gqa2'}")
    assert (code, err.count("\n")) == (6, 1), err
    assert os.environ["HOME"] not in err.replace(str(artifact), "")


def test_nothing_here_runs_what_it_reads() -> None:
    """No pickle, no eval, no YAML but by OmegaConf's safe loader, no class by its name."""
    forbidden = {"eval", "exec", "instantiate", "load_module", "import_module", "pickle", "dill", "shelve", "marshal"}
    seen = set()
    for room in (*ROOMS, "runtime_tests"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                if isinstance(node, ast.ImportFrom):
                    names.append(str(node.module))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    names.append(node.func.id)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                    names += [node.func.attr] if node.func.attr in ("instantiate", "import_module") else []
                    names += ["pickle"] if (owner, node.func.attr) in (("torch", "load"), ("yaml", "load")) else []
                seen |= {f"{file.name}: {name}" for name in names if {name, name.partition(".")[0]} & forbidden}
                if "runpy" in names:
                    seen.add(f"{file.name}: runpy")
    # A checker, which the user names, and no artifact can; what this process asks its fork server for.
    assert seen == {"tasks.py: runpy", "forkserver.py: import_module"}


# ---- What never ends ----


def test_a_pattern_that_backtracks_without_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = json.loads((BUNDLED / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": pattern}))
    tokenizer = tokenizers_.load_tokenizer(tmp_path)
    assert tokenizer is not None
    with pytest.raises(UsageError, match=r"cannot encode the text: .*retry-limit"):
        tokenizers_.encode(tokenizer, "a" * 5000 + "!")
    assert capfd.readouterr() == ("", "")  # nor does the library's panic show


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{% set x = 9 ** (9 ** 9) %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{% for a in m %}" * 40 + "{% endfor %}" * 40,
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
    ids=["loops", "memory", "power", "recursion", "sandbox", "nested", "deep"],
)
def test_a_template_that_never_ends(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 2)
    started = time.monotonic()
    with pytest.raises((InputError, UsageError), match="template"):
        chat.render_chat(template, [{"role": "user", "content": "x"}], {})
    assert time.monotonic() - started < 10


def test_work_under_limits() -> None:
    def grow() -> int:
        return len(bytearray(2**30))

    def fail() -> None:
        raise ArtifactError("its own words")

    assert limited(10, 2**28, sum, [1, 2]) == 3
    with pytest.raises(ArtifactError, match="its own words"):
        limited(10, 2**28, fail)
    with pytest.raises(LimitError, match="took longer than 1 s"):
        limited(1, 2**28, time.sleep, 30)
    with pytest.raises(LimitError, match="took more than 256 MiB"):
        limited(10, 2**28, grow)
    for name in ("SIGSEGV", "SIGABRT", "SIGKILL"):
        with pytest.raises(LimitError, match=rf"crashed \({name}\)"):
            limited(10, 2**28, lambda number: os.kill(os.getpid(), number), getattr(signal, name))
    # What it has started ends with it.
    with pytest.raises(LimitError):
        limited(1, 2**28, subprocess.run, ["sleep", "987654"])
    time.sleep(0.2)
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"987654" in line for line in running)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("crashes", r"crashed \(SIGSEGV\)"),
        ("hangs", "hung"),
        ("ends", "ended early"),
        ("complains", "at last"),
    ],
)
def test_a_program_that_does_not_end_well(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, ends: str, said: str
) -> None:
    in_place_of_children(monkeypatch, ends)
    with pytest.raises(ProgramError, match=said):
        replay(artifact / "model.pte", artifact / "reference.safetensors")
    with pytest.raises(TraceError, match=said):
        trace(artifact / "model.pte", short_ones(artifact))


def in_place_of_children(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """One of tests/children.py is run wherever a program would be."""
    for room in ("replay", "trace"):
        monkeypatch.setattr(
            f"validation.{room}.run_child",
            lambda _, arguments, hear: run_child("tests.children", [what, *arguments], hear),
        )


def short_ones(artifact: Path) -> tuple[Sequence, ...]:
    sequences = load_reference(artifact / "reference.safetensors").sequences
    return tuple(sequence for sequence in sequences if sequence.name.startswith("short"))[:2]


def test_a_copy_computes_though_torchs_threads_are_not_in_it() -> None:
    code = (
        "import torch; from runtime.limits import limited; torch.set_num_threads(3); torch.ones(10**7).bfloat16(); "
        "print(limited(20, 2**30, lambda: torch.ones(10**7).bfloat16().shape[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "10000000\n"), done.stderr


def test_a_call_that_hangs_is_ended(artifact: Path) -> None:
    """As validation arms it, with a second in place of a minute."""
    code = (
        "import time; from runtime import Program; from pathlib import Path; from runtime import limits as limited; "
        f"p = Program.open(Path({str(artifact)!r})); p.before_call = lambda T: limited.end_if_call_hangs(T, 0); "
        "set_ = limited.signal.setitimer; limited.signal.setitimer = lambda which, s: set_(which, s / 60); "
        "p._forward = type('F', (), {'execute': lambda self, x: time.sleep(30)})(); p.forward([1], 0, 1)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGALRM, done.stderr
    assert time.monotonic() - started < 25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("records-in-too-little", "cannot be recorded: it takes more memory than such a program needs"),
        ("records-too-long", "the runtime hung"),
    ],
)
def test_a_recording_is_limited(artifact: Path, monkeypatch: pytest.MonkeyPatch, change: str, said: str) -> None:
    """The process that records a program, with less memory, or with a call that does not end."""
    in_place_of_children(monkeypatch, change)
    with pytest.raises(TraceError, match=said) as raised:
        trace(artifact / "model.pte", short_ones(artifact))
    assert "\n" not in str(raised.value)


def test_a_record_has_a_limit(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program says of its tensors is memory that would be taken."""
    monkeypatch.setattr("validation.trace.MOST", 2**20)
    with pytest.raises(TraceError, match=r"the record of short-00 would take \d+ MiB"):
        trace(artifact / "model.pte", short_ones(artifact))


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_crash_while_writing_is_a_line(command: str) -> None:
    """The program runs in the command's own process there, and another one watches it."""
    code = (
        f"import os, signal, sys; sys.argv = ['x', {command!r}]; from pipeline import __main__, cli; "
        "cli.dispatch = lambda *_: os.kill(os.getpid(), signal.SIGSEGV); sys.exit(__main__.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr == "error: the runtime crashed (SIGSEGV) while running the program\n"


# ---- What is shown ----


def test_nothing_that_a_terminal_obeys_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line("a\nb\x1b[2J\ud800é") == "a\\nb\\x1b[2J\\ud800é"
    show_figures(Console(width=120), [Figure("quality", "cosine", 1, 0, True, "[/bold] \x1b[2J\nx")])
    shown = capsys.readouterr().out
    assert "[/bold]" in shown
    assert "\x1b[2J" not in shown
