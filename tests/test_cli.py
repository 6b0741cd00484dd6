"""What a user can do wrong: one clear line, the documented exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import config, road
from pipeline.__main__ import HELP
from pipeline.commands import COMMANDS
from pipeline.config import hints_of
from pipeline.schema import PATHS, SCHEMAS, TEXTS
from runtime import errors
from tests.checkpoints import BUNDLED, GOLDEN, ROOT, Build
from tests.resealing import reseal

Pipeline = Callable[..., tuple[int, str, str]]
PYTHON = [sys.executable, "-m", "pipeline"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a golden checkpoint, to be damaged."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "gqa2", folder, ignore=shutil.ignore_patterns("cases.*"))
    return folder


@pytest.fixture
def refused(pipeline: Pipeline, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail with this exit code and one line, and must leave nothing behind."""
    before = sorted(tmp_path.iterdir())

    def run(exit_code: int, *arguments: str) -> str:
        if arguments[0] == "run" and not any(a.startswith("output=") for a in arguments):
            arguments = (*arguments, f"output={tmp_path / 'made' / 'artifact'}")
        code, _, err = pipeline(*arguments)
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert code == exit_code, err
        made = tmp_path / "made"
        assert not made.exists() or not list(made.iterdir())
        assert [p for p in sorted(tmp_path.iterdir()) if p not in before and p != made and p.name.startswith(".")] == []
        return err

    return run


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from pipeline.__main__ import main; code = main(['--help']); "
        "heavy = {'torch', 'hydra', 'rich', 'executorch'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == HELP


def test_help_names_every_exit_code() -> None:
    named = {int(code) for code in re.findall(r"\b(\d+) [a-z]", HELP.partition("exit codes:")[2])}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PipelineError)]
    assert named == {0, errors.INTERNAL_ERROR, errors.INTERRUPTED} | {c.exit_code for c in classes}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rn"], ["no command 'rn'", "did you mean 'run'"]),
        (["run", "recipe=int4_xnnpak"], ["no recipe 'int4_xnnpak'", "did you mean 'int4_xnnpack'", "fp32_portable"]),
        (["run", "task=sudokus"], ["no task 'sudokus'", "did you mean 'sudoku'"]),
        (["run", "checkpont=x"], ["no key 'checkpont'", "did you mean 'checkpoint'"]),
        (["run", "recip=int4_xnnpack"], ["no key 'recip'", "did you mean 'recipe'"]),
        (["run", "export.max_seqlen=3"], ["no key 'export.max_seqlen'", "did you mean 'export.max_seq_len'"]),
        (
            ["run", "recipe=fp16_xnnpack", "recipe.linear.rounding=nearest"],
            ["recipe.linear.rounding: there is nothing to set it in"],
        ),
        (["run", "recipe.linear.group_sz=3"], ["no key 'recipe.linear.group_sz'", "'recipe.linear.group_size'"]),
        (["run", "+surplus=1"], ["no key 'surplus'"]),
        (["run", "+recipe.surplus=1"], ["no key 'recipe.surplus'"]),
        (["run", "~checkpoint"], ["checkpoint is not given"]),
        (["run", "~recipe.bounds.kl_slack"], ["recipe.bounds.kl_slack", "does not support deletion"]),
        (["run", "export.max_seq_len=abc"], ["export.max_seq_len", "'abc'", "Integer"]),
        (["run", "overwrite=maybe"], ["overwrite", "'maybe'", "bool"]),
        (["run", "recipe.backend=xnpack"], ["recipe.backend", "'xnpack'", "did you mean 'xnnpack'"]),
        (["run", "foo"], ["cannot read 'foo'", "key=value"]),
        (["run", "=3"], ["Config group"]),
        (["run", "recipe=[a"], ["cannot read 'recipe=[a'"]),
        (["run", "--multirun", "recipe=fp32_xnnpack,nope"], ["no recipe 'nope'"]),
        (["run", "--nope"], ["no flag '--nope'", "--multirun"]),
        (["recipes", "x=1"], ["recipes takes no arguments"]),
        (["run", "validation.n_prompts=1"], ["validation.n_prompts 1", "at least 8"]),
        (["run", "validation.seed=99999999999999999999999"], ["validation.seed"]),
        (["run", "task.new_tokens=0"], ["task.new_tokens 0"]),
        (["run", "task.checker=/nowhere"], ["task.checker", "/nowhere"]),
        (["run", "task.checker=null"], ["task.n_solve 1000", "task.checker"]),
        (["run", "task.threshold=2"], ["task.threshold 2", "0 to 1"]),
        (["run", "task.prompts=/nowhere"], ["task.prompts", "/nowhere"]),
        (["run", "max_length=64"], ["no key 'max_length'", "did you mean 'export.max_seq_len'"]),
        (["run", "model=x"], ["no key 'model'", "did you mean 'checkpoint'"]),
        (["generate", "gen_length=64"], ["no key 'gen_length'", "did you mean 'max_new_tokens'"]),
        (["generate", "max_tokens=64"], ["no key 'max_tokens'", "did you mean 'max_new_tokens'"]),
        (["generate", "max_length=64"], ["no key 'max_length'", "did you mean 'max_new_tokens'"]),
        (["evaluate", "max_gen_len=64"], ["no key 'max_gen_len'", "did you mean 'max_new_tokens'"]),
        (["evaluate", "limit=64"], ["no key 'limit'", "did you mean 'n'"]),
        (["bench", "gen_length=64"], ["no key 'gen_length'", "did you mean 'new_tokens'"]),
        (["run", "output="], ["output is empty"]),
        (["run", "--multirun", "checkpoint=a,,b"], ["checkpoint is empty"]),
        (["validate", "artifact="], ["artifact is empty"]),
        (["validate"], ["artifact is not given"]),
        (["validate", "artefact=x"], ["no key 'artefact'", "did you mean 'artifact'"]),
    ],
    ids=" ".join,
)
def test_wrong_keys_and_values(refused: Callable[..., str], arguments: list[str], words: list[str]) -> None:
    line = refused(2, *arguments)
    assert all(word in line for word in words), line


# Each means something to Hydra's grammar, to OmegaConf, or to YAML.
ODD_NAMES = ["2026_11_27", "1e3", "null", "true", "epoch=3", "a b, c", "[1]", "{a: 1}", "#1", "x~", "${y}", "$x", "("]
ODD_NAMES += ["\\${y}\\", 'it\'s "so"', "a\\,b", "*?%", "数独", "  ", "a:b", "\\'"]


@pytest.fixture
def asked(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """What `run` gets to do."""

    def run(*arguments: str) -> list[Any]:
        configs: list[Any] = []
        monkeypatch.setitem(COMMANDS, arguments[0], configs.append)
        code, _, err = pipeline(*arguments)
        assert (code, err) == (0, "")
        return configs

    return run


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_is_taken_as_it_stands(name: str, asked: Callable[..., list[Any]]) -> None:
    task = f"task.prompts=/t/{name}", f"task.checker=c/{name}", f"task.name={name}"
    (config,) = asked("run", f"checkpoint=models/{name}", f"cache=./{name}", *task, "recipe=fp32_xnnpack")
    assert (config.checkpoint, config.cache) == (f"models/{name}", f"./{name}")
    assert config.output == f"artifacts/{Path(name).resolve().name}-fp32_xnnpack"
    assert (config.task.prompts, config.task.checker, config.task.name) == (f"/t/{name}", f"c/{name}", name)
    (config,) = asked("run", f"cache={name}", f"++output={name}")
    assert (config.output, config.cache) == (name, name)


def test_a_sweep_of_paths(asked: Callable[..., list[Any]]) -> None:
    """Between commas; one that is part of a path has a backslash before it."""
    names = [name for name in ODD_NAMES if "\\" not in name]
    checkpoints = ",".join("m/" + name.replace(",", r"\,") for name in names)
    swept = asked("run", "--multirun", f"checkpoint={checkpoints}", "recipe=fp32_xnnpack")
    assert [config.checkpoint for config in swept] == [f"m/{name}" for name in names]


def test_a_tilde_is_a_home(asked: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home of")
    (config,) = asked("validate", "artifact=~/x", "checkpoint=~nobody-of-this-name/x", "summary=x/~", "junit=null")
    assert (config.artifact, config.checkpoint) == ("/home of/x", "~nobody-of-this-name/x")
    assert (config.summary, config.junit) == ("x/~", None)
    (config,) = asked("validate", "artifact=~root")
    assert config.artifact == pwd.getpwnam("root").pw_dir
    assert [config.checkpoint for config in asked("run", "-m", "checkpoint=~/a,~/b")] == ["/home of/a", "/home of/b"]


def test_every_key_of_text_is_a_path_or_not() -> None:
    for schema in SCHEMAS.values():
        texts = {key.rpartition(".")[2] for key, hint in hints_of(schema).items() if hint in (str, str | None)}
        assert texts <= PATHS | TEXTS
    assert not PATHS & TEXTS


def test_cfg_job_prints_the_config_and_builds_nothing(pipeline: Pipeline) -> None:
    code, out, err = pipeline("run", "--cfg", "job", "recipe=int8_xnnpack")
    assert (code, err) == (0, "")
    assert "name: int8_xnnpack" in out
    assert "weight_bits: 8" in out


def test_recipes_are_listed(pipeline: Pipeline) -> None:
    code, out, _ = pipeline("recipes")
    assert code == 0
    assert "int4_xnnpack" in out
    assert "groups of 32" in out


@pytest.mark.parametrize("command", ["recipes", "run", "inspect"])
def test_an_installation_without_recipes_says_so(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.setattr(config, "CONF", tmp_path / "conf")
    assert "not installed whole" in refused(2, command)


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("dreamedge ", {*COMMANDS, "recipes"}),
        ("dreamedge run recipe=int", {"recipe=int4_xnnpack", "recipe=int4_fast_xnnpack", "recipe=int8_xnnpack"}),
        ("dreamedge run export.max_", {"export.max_seq_len=", "export.max_rows="}),
        ("dreamedge validate art", {"artifact="}),
    ],
)
def test_bash_completes(line: str, completions: set[str]) -> None:
    """As bash does it: the installed function, on what was typed so far."""
    script = f"""
        eval "$(dreamedge --shell-completion install=bash)"
        COMP_LINE={line!r} COMP_POINT={len(line)} COMP_WORDS=({line}) COMP_CWORD={len(line.split()) - (line[-1] != " ")}
        hydra_bash_completion
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert set(done.stdout.split()) == completions, done.stderr


def test_unusable_checkpoints(refused: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    """The loader's own tests cover each kind; here the way out: exit code 3, its line, nothing written."""
    assert "no such folder" in refused(3, "run", f"checkpoint={tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(3, "run", f"checkpoint={tmp_path / 'empty'}")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    assert "'qwen2'" in refused(3, "run", f"checkpoint={checkpoint}")
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "yarn", "factor": 4}}))
    assert "rope_scaling" in refused(3, "run", f"checkpoint={checkpoint}")
    (checkpoint / "config.json").write_text(json.dumps(config))
    weights = checkpoint / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    wrong = dict(tensors)
    del wrong["model.norm.weight"]
    wrong["model.surplus"] = torch.zeros(3)
    wrong["lm_head.weight"] = torch.zeros(2, 2)
    save_file(wrong, weights)
    line = refused(3, "run", f"checkpoint={checkpoint}")
    for words in ("missing: model.norm.weight [64]", "surplus: model.surplus [3]", "lm_head.weight is [2, 2]"):
        assert words in line
    save_file(tensors | {"model.norm.weight": torch.full((64,), torch.nan)}, weights)
    assert "NaN or infinite values: model.norm.weight" in refused(3, "run", f"checkpoint={checkpoint}")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged or truncated" in refused(3, "run", f"checkpoint={checkpoint}")
    weights.rename(checkpoint / "pytorch_model.bin")
    assert "never opened" in refused(3, "run", f"checkpoint={checkpoint}")


def test_more_unusable_checkpoints(refused: Callable[..., str], checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**7}))
    assert "the config asks for 10000000 layers" in refused(3, "run", f"checkpoint={checkpoint}")
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "tokenizer.json").write_text("{")
    assert "tokenizer.json: not JSON" in refused(3, "run", f"checkpoint={checkpoint}")


def test_recipes_that_do_not_fit(refused: Callable[..., str]) -> None:
    gqa2 = f"checkpoint={GOLDEN / 'gqa2'}"
    line = refused(4, "run", gqa2, "recipe.linear.group_size=64")
    assert "layers.0.mlp.down_proj is 160 wide, not a multiple of group_size 64" in line
    assert "group_size must be a multiple of 32" in refused(4, "run", gqa2, "recipe.linear.group_size=16")
    assert "8-bit ones per channel" in refused(4, "run", gqa2, "recipe.linear.weight_bits=8")
    assert "max_position_embeddings" in refused(4, "run", gqa2, "export.max_seq_len=131073")
    assert "export.max_rows" in refused(4, "run", gqa2, "export.max_seq_len=64", "export.max_rows=65")


def test_an_artifact_is_not_overwritten(build: Build, refused: Callable[..., str], tmp_path: Path) -> None:
    artifact = build("gqa2", "fp32_xnnpack")
    before = (artifact / "manifest.json").read_bytes()
    line = refused(7, "run", f"checkpoint={GOLDEN / 'gqa2'}", f"output={artifact}")
    assert "already there" in line
    assert "overwrite=true" in line
    assert (artifact / "manifest.json").read_bytes() == before
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all my work")
    line = refused(7, "run", f"checkpoint={GOLDEN / 'gqa2'}", f"output={precious}", "overwrite=true")
    assert "is no artifact" in line
    assert (precious / "thesis.txt").read_text() == "all my work"


def test_a_task_that_the_checkpoint_cannot_solve(checkpoint: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Against a share of none, no program could be out of bounds."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, checkpoint)
    few = ["task.n_solve=8", "validation.n_prompts=8", "export.max_seq_len=64", f"output={tmp_path / 'artifact'}"]
    line = refused(2, "run", f"checkpoint={checkpoint}", "recipe=fp32_xnnpack", "task=sudoku", *few)
    assert "task 'sudoku' does not fit the checkpoint: its float32 model solves 0.0% of 8 prompts" in line
    assert not (tmp_path / "artifact").exists()


def test_out_of_bounds_is_kept_under_another_name(pipeline: Pipeline, tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    code, _, err = pipeline(
        "run",
        f"checkpoint={GOLDEN / 'gqa2'}",
        "recipe=fp32_xnnpack",
        "recipe.bounds.planned_memory=0.1",
        f"output={output}",
        "export.max_seq_len=64",
    )
    assert code == 5
    assert "planned_memory is" in err
    assert "must be at most" in err
    assert not output.exists()
    failed = tmp_path / "artifact.failed"
    assert str(failed) in err
    assert not json.loads((failed / "report.json").read_text())["valid"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact.failed"]


def test_output_that_cannot_be_written(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(7, "run", f"checkpoint={GOLDEN / 'gqa2'}", f"output={tmp_path / 'file' / 'artifact'}")
    assert "cannot be written" in line
    line = refused(7, "run", f"checkpoint={GOLDEN / 'gqa2'}", f"output={tmp_path / ('x' * 300)}")
    assert "File name too long" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(pipeline: Pipeline, small_disk: Path) -> None:
    code, _, err = pipeline(
        "run",
        f"checkpoint={GOLDEN / 'gqa2'}",
        "recipe=fp32_xnnpack",
        f"output={small_disk / 'artifact'}",
        "export.max_seq_len=64",
        "force=true",  # or it is found before
    )
    assert code == 7
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert list(small_disk.iterdir()) == []


def test_damaged_artifacts(refused: Callable[..., str], artifact: Path, tmp_path: Path) -> None:
    assert "no such artifact folder" in refused(6, "validate", f"artifact={tmp_path / 'nowhere'}")
    pte, manifest_file = artifact / "model.pte", artifact / "manifest.json"
    whole, manifest = pte.read_bytes(), json.loads(manifest_file.read_text())

    def validate() -> str:
        return refused(6, "validate", f"artifact={artifact}")

    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    pte.write_bytes(flipped)
    assert "its sha256 is not the manifest's" in validate()
    pte.write_bytes(whole[:-1])
    assert "the manifest says" in validate()
    pte.unlink()
    assert "missing, the manifest names it" in validate()
    pte.write_bytes(whole)
    manifest_file.write_text("{")
    assert "not a manifest" in validate()
    manifest_file.write_text("[" * 100_000)
    assert "not a manifest" in validate()
    for bound in (True, "1", float("inf"), 10**400, None):
        recipe = manifest["recipe"] | {"bounds": manifest["recipe"]["bounds"] | {"kl_slack": bound}}
        manifest_file.write_text(json.dumps(manifest | {"recipe": recipe}))
        reseal(artifact)
        assert "not a manifest" in validate()
    manifest_file.write_text(json.dumps(manifest | {"schema_version": 99}))
    assert "schema version 99" in validate()
    manifest_file.write_text(json.dumps(manifest | {"files": manifest["files"] | {"../x": {"sha256": "", "bytes": 0}}}))
    reseal(artifact)
    assert "is no file of this folder" in validate()
    manifest_file.unlink()
    assert "not an artifact, or not a whole one" in validate()


def test_a_cut_down_reference_does_not_pass(refused: Callable[..., str], artifact: Path) -> None:
    """Fewer recorded calls would be easier to pass."""
    from validation.reference import load_reference, save_reference

    file = artifact / "reference.safetensors"
    whole = load_reference(file)
    file.unlink()
    save_reference(replace(whole, sequences=whole.sequences[:1], expected=whole.expected[:1]), file)
    reseal(artifact)
    assert "lacks the recorded calls max-length" in refused(6, "validate", f"artifact={artifact}")


def test_a_damaged_program_that_matches_its_hash(refused: Callable[..., str], artifact: Path) -> None:
    """Somebody made a manifest for a broken file: the runtime's refusal is a line, not a crash."""
    pte = artifact / "model.pte"
    pte.write_bytes(pte.read_bytes()[:-5000])
    reseal(artifact)
    assert "model.pte" in refused(6, "validate", f"artifact={artifact}")


def test_what_a_library_makes_of_an_interrupt_is_no_error(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wraps(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException as error:
            raise RuntimeError("export failed") from error

    monkeypatch.setattr(road, "load", wraps)
    given = (f"checkpoint={GOLDEN / 'gqa2'}", f"output={tmp_path / 'made'}")
    for _ in range(2):
        assert pipeline("run", *given) == (130, "", "error: interrupted\n")
    monkeypatch.setattr(road, "load", lambda *_: 1 / 0)
    assert pipeline("run", *given)[0] == 1, "the next error is one"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_cleanly(tmp_path: Path, stop: signal.Signals) -> None:
    output = tmp_path / "artifact"
    command = [*PYTHON, "run", f"checkpoint={GOLDEN / 'mqa4-sharded'}", f"output={output}"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / ".artifact.partial"
    while not partial.exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(stop)
    _, err = run.communicate()
    assert run.returncode == 130
    assert err == "error: interrupted\n"
    assert list(tmp_path.iterdir()) == []
