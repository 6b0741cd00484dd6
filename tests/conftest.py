"""What the tests share: checkpoints, and artifacts that are built once in a run."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.__main__ import main
from runtime.limits import alone_in_a_copy
from runtime.memory import collect_seldom
from tests.checkpoints import BUNDLED, GOLDEN, ROOT, Build, arguments

os.register_at_fork(after_in_child=alone_in_a_copy)
# A shell has what it does not wait for ignore Ctrl-C, and all of its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has one core to itself, and so have the processes that it starts, unless somebody tries more threads.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    # What is freed is taken again, not given back and asked for anew: a tenth of a build's time.
    collect_seldom()
    ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD of mallopt(3), at its most


# What takes minutes comes first, so that both workers end together (`make test` lets an idle one steal).
LONG = (
    "fullsize", "survival", "road", "explain", "lowering", "stored", "evidence", "docs", "installed", "cli",
    "export_model",
)  # fmt: skip


# What takes ten seconds or more, and of whose kind another stays in `make test`: `make test-extra` runs these.
EXTRA = (
    "test_arm.py::test_an_artifact_is_right_on_each_core[dream_sudoku-int4_xnnpack",
    "test_arm.py::test_an_artifact_is_right_on_each_core[gqa2-fp16_xnnpack",
    "test_docs.py::test_commands_run_as_shown[ci.md]",
    "test_docs.py::test_commands_run_as_shown[explain.md]",
    "test_docs.py::test_commands_run_as_shown[provenance.md]",
    "test_docs.py::test_commands_run_as_shown[registry.md]",
    "test_docs.py::test_commands_run_as_shown[tasks.md]",
    "test_evidence.py::test_with_other_kernels_the_evidence_is_the_same_but_for_rounding",
    "test_explain.py::test_a_right_program_raises_no_alarm[mqa4-sharded-int8_xnnpack]",
    "test_export_model.py::test_export_model[fp16-40.0]",
    "test_export_model.py::test_export_model[int4-10.0]",
    "test_export_model.py::test_export_model[int8-25.0]",
    "test_format.py::test_a_right_program_of_the_worst_shape_is_within_bounds[fp32_portable]",
    "test_lora.py::test_a_run_with_an_adapter_makes_what_the_merged_checkpoint_makes",
    "test_lowering.py::test_merging_and_fewer_passes_change_no_result",
    "test_packed.py::test_a_program_opens_with_the_weights_that_were_packed_before[fp16_xnnpack]",
    "test_packed.py::test_a_program_opens_with_the_weights_that_were_packed_before[int8_xnnpack]",
    "test_packed.py::test_matrices_that_the_runtime_takes_for_one_are_refused[int4_fast_xnnpack]",
    "test_packed.py::test_matrices_that_the_runtime_takes_for_one_are_refused[int4_xnnpack]",
    "test_packed.py::test_commands_keep_them",
    "test_packed.py::test_programs_have_files_of_their_own",
    "test_program.py::test_any_calls_give_what_eager_gives[fp32_portable]",
    "test_program.py::test_whole_sequences_are_the_references[gqa2-fp32_portable]",
    "test_program.py::test_whole_sequences_are_the_references[mqa4-sharded-fp32_xnnpack]",
    "test_rewritten.py::test_a_rewritten_network_is_a_valid_artifact[gqa2-int8_xnnpack-keys1]",
    "test_rewritten.py::test_a_rewritten_network_is_a_valid_artifact[mha-tied-fp32_xnnpack-keys2]",
    "test_road.py::test_recipe_builds_a_valid_artifact[dream_sudoku-fp16_xnnpack]",
    "test_road.py::test_recipe_builds_a_valid_artifact[dream_sudoku-fp32_portable]",
    "test_road.py::test_recipe_builds_a_valid_artifact[dream_sudoku-fp32_xnnpack]",
    "test_road.py::test_recipe_builds_a_valid_artifact[dream_sudoku-int4_fast_xnnpack]",
    "test_road.py::test_recipe_builds_a_valid_artifact[mha-tied-fp32_portable]",
    "test_road.py::test_recipe_builds_a_valid_artifact[mqa4-sharded-int8_xnnpack]",
    "test_road.py::test_same_export_in_another_process_gives_the_same_bytes",
    "test_runner.py::test_it_needs_no_torch_and_no_python",
    "test_runner_tokenizer.py::test_damaged_files_are_refused_or_read[artifact]",
    "test_stored.py::test_the_same_program_as_from_memory[int8_xnnpack]",
    "test_survival.py::test_an_interrupted_quantization_is_taken_up[15]",
    "test_tune.py::test_the_command_tunes_and_run_takes_what_it_wrote",
)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is no garbage: pytest looks through all of it, several times, when it ends


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(EXTRA):
            item.add_marker("extra")

    def rank(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of one run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def build(shared: Path) -> Build:
    """build(checkpoint name, recipe): an artifact by `python -m pipeline run`, made once. Do not change it."""
    folder = shared / "artifacts"
    folder.mkdir(exist_ok=True)

    def make(checkpoint: str, recipe: str) -> Path:
        output = folder / f"{checkpoint}-{recipe}"
        with FileLock(f"{output}.lock"):
            if not output.exists():
                paths = [f"output={output}", f"cache={folder / 'cache'}"]
                assert main(["run", f"recipe={recipe}", *paths, *arguments(checkpoint, recipe)]) == 0
        return output

    return make


@pytest.fixture(scope="session")
def sudoku(build: Build) -> Path:
    """The main job's artifact."""
    return build(BUNDLED.name, "int4_xnnpack")


@pytest.fixture(scope="session")
def native() -> Callable[..., Path]:
    """native(processor): `dreamedge-run` built for it, once; what is there and has not changed is not built again."""

    def made(processor: str = platform.machine()) -> Path:
        make("runner", f"ARCH={processor}")
        return ROOT / "build" / f"runner-{processor}" / "dreamedge-run"

    return made


@pytest.fixture(scope="session")
def check() -> Path:
    """`dreamedge-check`: the parts of the runner that read foreign bytes, under sanitizers."""
    make("runner-check")
    return ROOT / "build" / "runner-check" / "dreamedge-check"


def make(*words: str) -> None:
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / f"{'-'.join(words)}.lock"):
        # The environment is there: it runs this.
        command = ["make", "-o", ".venv/.ready", *words, "JOBS=1"]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr


@pytest.fixture
def artifact(build: Build, tmp_path: Path) -> Path:
    """A copy of a float32 artifact of gqa2, to be damaged."""
    folder = tmp_path / "artifact"
    shutil.copytree(build("gqa2", "fp32_xnnpack"), folder)
    return folder


@pytest.fixture
def pipeline(capsys: pytest.CaptureFixture[str], shared: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs `python -m pipeline` in this process: (exit code, stdout, stderr). Tests that name no cache share one."""
    cache = shared / "artifacts" / "cache"

    def run(*arguments: str) -> tuple[int, str, str]:
        if arguments[:1] == ("run",) and not any(argument.startswith("cache=") for argument in arguments):
            arguments = (*arguments, f"cache={cache}")
        capsys.readouterr()
        exit_code = main(list(arguments))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit_code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the tokenizer files that real Dream checkpoints have, and no tokenizer.json."""
    folder = tmp_path_factory.mktemp("chatty") / "chatty"
    shutil.copytree(GOLDEN / "gqa2", folder, ignore=shutil.ignore_patterns("cases.*", "generation.*"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat and the hat and the rat sat on the mat"] * 4, trainer)
    tokenizer.model.save(str(folder))
    names = {300: "<|endoftext|>", 301: "<|im_start|>", 302: "<|im_end|>", 317: "<|mask|>"}
    assert len(json.loads((folder / "vocab.json").read_text())) <= 300
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings = {
        "added_tokens_decoder": {str(i): {"content": name, "special": True} for i, name in names.items()},
        "eos_token": names[300], "pad_token": names[300], "mask_token": names[317], "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, 305]}))
    return folder


@pytest.fixture(scope="session")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's own task, which any answer solves that is not empty."""
    folder = tmp_path_factory.mktemp("task")
    prompts = ["the cat", "a hat, mat"] * 4
    (folder / "words.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (folder / "words.py").write_text("def check(prompt, answer):\n    return len(answer) > 0 and 'cat' in prompt\n")
    return folder


@pytest.fixture(scope="session")
def chatty_artifact(chatty: Path, own_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "chatty-fp32"
    arguments = ["recipe=fp32_xnnpack", f"checkpoint={chatty}", f"output={output}", "export.max_seq_len=128"]
    task = [f"task.prompts={own_task}/words.jsonl", f"task.checker={own_task}/words.py", "task.name=words"]
    assert main(["run", *arguments, *task, "task.n_solve=2", "task.new_tokens=6"]) == 0
    return output
