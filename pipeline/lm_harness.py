"""An artifact as a model of lm-evaluation-harness: its tasks, its figures, our program.

Of lm-eval 0.4: `LM`'s three calls. A likelihood is that of the tokens written from left to right, one call a token,
what stands after them still masked: exact, and the same whatever the batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from torch import Tensor

from runtime.answers import answer
from runtime.errors import UsageError
from runtime.text import TextArtifact
from runtime.tokenizer import encode

MOST_NEW = 256  # tokens of an answer, where a task does not say


class ProgramLM(LM):  # type: ignore[misc]
    """options: of `runtime.generate`, for answers. Raises `PipelineError`, as `runtime.answers.answer` does."""

    def __init__(self, artifact: TextArtifact, options: dict[str, Any]) -> None:
        super().__init__()
        self.artifact, self.options = artifact, options

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(nats of the continuation, whether each of its tokens is the likeliest)"""
        return [self._likelihood(*self._split(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts, in pieces of what the program holds; the first token of each is given."""
        found = []
        for request in requests:
            ids = torch.tensor(encode(self.artifact.tokenizer, request.args[0]))
            pieces = ids.split(self.artifact.program.max_seq_len)
            found.append(sum(self._likelihood(piece[:1], piece[1:])[0] for piece in pieces))
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self._written(*request.args) for request in requests]

    def _split(self, context: str, continuation: str) -> tuple[Tensor, Tensor]:
        """Their tokens; of a long context the end."""
        whole = encode(self.artifact.tokenizer, context + continuation)
        n = min(len(encode(self.artifact.tokenizer, context)), len(whole) - 1) if context else 0
        given, asked = torch.tensor(whole[:n], dtype=torch.int64), torch.tensor(whole[n:], dtype=torch.int64)
        room = self.artifact.program.max_seq_len - len(asked)
        if room < 1:
            raise UsageError(f"a continuation of {len(asked)} tokens leaves no room for what is before it")
        if not len(given):
            given = torch.tensor([self.artifact.program.metadata.get_bos_id])
        return given[-room:], asked

    def _likelihood(self, given_P: Tensor, asked_K: Tensor) -> tuple[float, bool]:
        program, nats, is_greedy = self.artifact.program, 0.0, True
        tokens_T = torch.cat([given_P, torch.full_like(asked_K, program.mask_id)])
        for k, token in enumerate(asked_K.tolist()):
            at = len(given_P) + k
            logits_V = program.start()(tokens_T, 0, len(tokens_T), torch.tensor([at - 1]))[0, 0].double()
            logits_V[program.mask_id] = -torch.inf
            nats += float(logits_V.log_softmax(-1)[token])
            is_greedy = is_greedy and int(logits_V.argmax()) == token
            tokens_T[at] = token
        return nats, is_greedy

    def _written(self, context: str, asked: dict[str, Any]) -> str:
        program = self.artifact.program
        until = asked.get("until") or []
        n_new = min(int(asked.get("max_gen_toks", MOST_NEW)), program.max_seq_len - 1)
        ids = encode(self.artifact.tokenizer, context)[-(program.max_seq_len - n_new) :]
        given = {name: asked[name] for name in ("temperature", "top_p") if asked.get("do_sample") and name in asked}
        stop = [until] if isinstance(until, str) else list(until)
        return answer(self.artifact, ids, n_new, self.options | given | {"stop_at_eos": True}, stop).text


def run_tasks(
    artifact: TextArtifact, options: dict[str, Any], tasks: list[str], folder: Path | None, limit: int | None
) -> dict[str, Any]:
    """lm-eval's results. folder: of tasks of one's own, beside lm-eval's. Raises `UsageError` for tasks that there are
    not, and for data that cannot be had.
    """
    try:
        manager = TaskManager(include_path=None if folder is None else str(folder))
        if missing := [name for name in tasks if name not in manager.all_tasks]:
            raise UsageError(f"lm_eval: there is no task {missing[0]!r}")
        model = ProgramLM(artifact, options)
        found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=1000)
    except (OSError, ValueError) as error:  # a dataset that is not there, a file of a task that is wrong
        raise UsageError(f"lm_eval: {str(error).splitlines()[0]}") from error
    assert found is not None
    return dict(found)
