"""The artifact to ship: what may, by which budgets, and what the notes say of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from pipeline.choice_schema import Preference, ReleaseBudget
from pipeline.choosing import BY_LOSS, BY_SIZE, preference_of
from tests.resealing import reseal, variant

Pipeline = Callable[..., tuple[int, str, str]]
HOSTILE = "x`</td><script>alert(1)</script>\n\n# [ship it](http:evil) | &"


@pytest.fixture(scope="module")
def candidates(sudoku: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("candidates")
    for name, kl, padding in (("small", 0.01, 0), ("middle", 0.004, 1000), ("right", 0.001, 2000)):
        variant(sudoku, folder / name, {"kl_divergence": kl}, padding=padding)
    return folder


@pytest.fixture
def released(pipeline: Pipeline, tmp_path: Path) -> Callable[..., tuple[int, dict[str, object], str]]:
    """(exit code, its JSON, the notes)."""

    def run(*words: str) -> tuple[int, dict[str, object], str]:
        notes = tmp_path / "notes.md"
        code, out, _ = pipeline("release", *words, f"notes={notes}", "--json")
        return code, json.loads(out or "{}"), notes.read_text() if notes.exists() else ""

    return run


Released = Callable[..., tuple[int, dict[str, object], str]]


@pytest.mark.parametrize(
    ("words", "ships"),
    [
        ([], "right"),
        (["budget.kl=0.005"], "middle"),  # within what may be lost, the smallest
        (["budget.kl=0.005", "budget.bytes=10000000"], "right"),
        (["budget.kl=0.005", "prefer=[kl]"], "right"),
        (["prefer=[bytes,kl]"], "small"),
        (["budget.kl=0.0001"], None),
        (["budget.bytes=1"], None),
        (["budget.memory=1"], None),
        (["budget.ms=0.000001"], None),
        (["budget.loss=0.1"], None),  # no text was measured
        (["budget.solved=0"], "small"),
    ],
)
def test_what_ships(released: Released, candidates: Path, words: list[str], ships: str | None) -> None:
    code, said, notes = released(*map(str, sorted(candidates.iterdir())), *words)
    assert (code, said["ships"]) == (0 if ships else 5, ships)
    assert notes.startswith(f"## ✅ `{ships}`\n" if ships else "## ❌ None may ship\n")
    others = {"small", "middle", "right"} - {ships}
    assert all(re.search(rf"^\| `{name}` \|", notes, flags=re.MULTILINE) for name in others)


def test_a_bound_is_met_at_itself(released: Released, candidates: Path) -> None:
    n_bytes = (candidates / "small" / "model.pte").stat().st_size
    words = [*map(str, candidates.iterdir()), "prefer=[kl]"]
    assert released(*words, f"budget.bytes={n_bytes}")[1]["ships"] == "small"
    assert released(*words, f"budget.bytes={n_bytes - 1}")[1]["ships"] is None


def test_why_the_others_do_not_ship(released: Released, candidates: Path, tmp_path: Path) -> None:
    for name in ("damaged", "added", "out", "resigned"):
        shutil.copytree(candidates / "right", tmp_path / name)
    (tmp_path / "damaged" / "tokenizer.json").write_text("{}")
    (tmp_path / "added" / "x").write_text("")
    (tmp_path / "resigned" / "provenance.dsse.json").write_text("{}")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["figures"][0]["ok"] = False
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    reseal(tmp_path / "out")
    names = ("damaged", "added", "out", "resigned")
    words = [*(str(tmp_path / name) for name in names), *map(str, candidates.iterdir())]
    code, said, _ = released(*words, "budget.kl=0.005")
    refused = said["refused"]
    assert isinstance(refused, dict)
    assert (code, said["ships"]) == (0, "middle")
    assert "tokenizer.json" in refused["damaged"]
    assert "it was added" in refused["added"]
    assert "not a DSSE envelope" in refused["resigned"]
    assert refused["out"] == "out of bounds when it was made: fidelity_db"
    assert refused["small"] == "over budget.kl=0.005: 0.01"


def test_what_changed_since_the_baseline(released: Released, candidates: Path) -> None:
    last = f"baseline={candidates / 'small'}"
    _, said, notes = released(str(candidates / "right"), last)
    assert re.search(r"^\| KL, nats \| 0.001 \| 0.01 \| -0.009 \|$", notes, flags=re.MULTILINE)
    assert "### Since `small`" in notes
    baseline = said["baseline"]
    assert isinstance(baseline, dict)
    rows = {row["name"]: row for row in baseline["rows"]}
    assert (rows["kl_divergence"]["a"], rows["kl_divergence"]["b"]) == (0.01, 0.001)
    assert released(str(candidates / "right"), f"baseline={candidates / 'nowhere'}")[0] == 6


def test_another_machine_is_not_compared(released: Released, sudoku: Path, tmp_path: Path) -> None:
    here, there = variant(sudoku, tmp_path / "here"), variant(sudoku, tmp_path / "there", machine={"cpus": 64})
    _, _, notes = released(str(here), f"baseline={there}")
    assert re.search(r"^\| step, ms .* other machine \|$", notes, flags=re.MULTILINE)
    assert "| speed |" not in notes
    code, _, _ = released(str(here), str(there), "prefer=[ms]")
    assert code == 2


def test_what_cannot_be_compared_is_not_chosen_by(pipeline: Pipeline, candidates: Path, tmp_path: Path) -> None:
    manifest = json.loads((candidates / "right" / "manifest.json").read_text())
    other = variant(candidates / "right", tmp_path / "other", validation=manifest["validation"] | {"seed": 1})
    words = [str(other), str(candidates / "right"), f"notes={tmp_path / 'notes.md'}"]
    code, _, err = pipeline("release", *words)
    assert (code, err.count("\n"), "different inputs" in err) == (2, 1, True)
    assert not (tmp_path / "notes.md").exists()
    assert pipeline("release", *words, "prefer=[bytes]")[0] == 0


def test_it_is_signed_and_published(released: Released, pipeline: Pipeline, candidates: Path, tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = tmp_path / "key.pem", tmp_path / "key.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    mine = tmp_path / "mine"
    shutil.copytree(candidates, mine)
    registry = tmp_path / "registry"
    code, said, notes = released(*map(str, mine.iterdir()), f"key={private}", f"registry={registry}")
    assert (code, said["ships"]) == (0, "right")
    assert f"`{said['id']}`" in notes
    assert f"`with key {said['key']}`" in notes
    assert pipeline("verify", f"artifact={mine / 'right'}", f"key={public}")[0] == 0
    assert pipeline("verify", f"registry={registry}", f"key={public}")[0] == 0
    assert [(mine / name / "provenance.dsse.json").exists() for name in ("small", "middle")] == [False, False]


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["budget.kl=-1"], 2, "budget.kl -1"),
        (["budget.kll=1"], 2, "did you mean 'budget.kl'"),
        (["prefer=[]"], 2, "one figure or more"),
        (["prefer=[speed]"], 2, "prefer"),
        (["key=/nowhere"], 2, "key /nowhere"),
        (["registry=nothing://x"], 2, "registry nothing://x"),
        (["notes=/nowhere/x.md"], 7, "/nowhere"),
    ],
)
def test_nothing_is_done_for_a_wrong_word(
    pipeline: Pipeline, candidates: Path, tmp_path: Path, words: list[str], exit_code: int, said: str
) -> None:
    notes = [] if words[0].startswith("notes") else [f"notes={tmp_path / 'notes.md'}"]
    code, out, err = pipeline("release", str(candidates / "right"), *notes, *words)
    assert (code, out, err.count("\n")) == (exit_code, "", 1), err
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_notes_are_no_file_of_an_artifact_and_every_folder_is_there(
    pipeline: Pipeline, candidates: Path, tmp_path: Path
) -> None:
    first = min(candidates.iterdir())
    code, _, err = pipeline("release", str(first), f"notes={first / 'release.md'}")
    assert (code, err.count("\n")) == (7, 1)
    assert "a file of the artifact" in err
    code, _, err = pipeline("compare", str(first), f"html={first / 'page.html'}")
    assert code == 7
    code, _, err = pipeline("release", str(first), str(tmp_path / "typo"), f"notes={tmp_path / 'n.md'}")
    assert (code, err.count("\n")) == (6, 1)
    assert "typo: no such folder" in err
    assert not (tmp_path / "n.md").exists()


def test_preferences() -> None:
    assert preference_of(None, ReleaseBudget()) == BY_LOSS
    assert preference_of(None, ReleaseBudget(kl=1)) == preference_of(None, ReleaseBudget(solved=1)) == BY_SIZE
    assert preference_of(None, ReleaseBudget(kl=1, bytes=1)) == preference_of(None, ReleaseBudget(ms=1)) == BY_LOSS
    assert preference_of([Preference.ms], ReleaseBudget(kl=1)) == [Preference.ms]


def test_words_of_an_artifact_stay_text(released: Released, candidates: Path, tmp_path: Path) -> None:
    manifest = json.loads((candidates / "right" / "manifest.json").read_text())
    said = {"words": HOSTILE, "is_judged": True}
    recipe = manifest["recipe"] | {"name": HOSTILE, "description": HOSTILE}
    ugly = variant(candidates / "right", tmp_path / HOSTILE.replace("/", ""), verdict=said, recipe=recipe)
    _, _, notes = released(str(ugly), f"baseline={candidates / 'small'}")
    assert re.sub(r"`[^`\n]*`", "", notes).count("<") == 0
    assert "\n# [ship" not in notes
    rows = [line for line in notes.splitlines() if line.startswith("| `recipe.name`")]
    assert len(re.split(r"(?<!\\)\|", rows[0])) == 7
